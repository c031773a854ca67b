"""Has a language model judge the answers of each arm, by the paper's five metrics, alone and in blinded pairs.

python -m pspo.judge outputs/<group> --base-url http://localhost:8000/v1 --model NAME
"""

import argparse
import asyncio
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pspo.base.command import answering
from pspo.base.console import log, log_to_console
from pspo.base.files import write_json, write_text
from pspo.base.schema import ConfigError, dotted
from pspo.compare.arms import Group, group
from pspo.compare.comparison import DEFAULT_REFERENCE, choose
from pspo.judge.measures import ABOUT, summarize
from pspo.judge.questions import METRICS, questions_about, sample, verdict
from pspo.results import load
from pspo.run import lock

ADDRESS = re.compile(r"https?://[^/?#@\s]+(/[^?#\s]*)?")
FAMILY = re.compile(r"qwen|llama|gemma|mistral|mixtral|deepseek|smollm|olmo|granite|falcon|gpt|(?<![a-z])phi")
"""Families of models by words in their names; a judge prefers its own family (Panickssery et al. 2024, 2404.13076)."""


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m pspo.judge", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="outputs/<group>, or run directories; verdicts go into the first's group")
    add("--base-url", required=True, help="address of the OpenAI protocol; OPENAI_API_KEY holds the key, if any")
    add("--model", required=True, metavar="NAME", help="the judge's name at that address")
    add("--against", metavar="ARM", help="compare every arm with this one; default: noclip, else the first arm")
    add("--set", action="append", default=[], dest="sets", help="test set; default: all")
    add("--metrics", nargs="+", default=list(METRICS), choices=METRICS, help="default: all")
    add("--limit", type=int, default=100, help="answers of each arm to judge, over problems and seeds (default 100)")
    add("--human", type=Path, help="lines of verdicts.jsonl with a person's verdict in each, for Cohen's κ")
    add("--concurrency", type=int, default=8, help="requests at a time (default 8)")
    add("--prices", nargs=2, type=float, default=(0.0, 0.0), metavar=("IN", "OUT"), help="of a million tokens")
    return parser.parse_args(words)


def judge(arguments: argparse.Namespace) -> None:
    """Ask what the cache does not answer; write and show every verdict there is, also where the judge gives out.

    Judged are the first greedy answers after training. Raises ConfigError.
    """
    check(arguments)
    from pspo.judge.ask import Judge  # imports openai, which ``check`` has found

    labels = read_labels(arguments.human)
    compared, name, address = group(load(arguments.paths)), arguments.model, arguments.base_url.rstrip("/")
    selected = choose(compared, arguments.sets, None, [], "after", "correct")
    answers = sample(compared, selected, arguments.limit)
    arms = [arm for arm in compared.arms if any(row["arm"] == arm for row in answers)]
    reference = compared.arm(arguments.against or (DEFAULT_REFERENCE if DEFAULT_REFERENCE in arms else arms[0]))
    questions = questions_about(answers, reference, arguments.metrics, name)
    paired = {reference} | {row["arm"] for row in questions if row["kind"] == "pair"}
    requests = {digest: body for question in questions for digest, body in question["requests"].items()}
    warnings = compared.left_out + one_family(compared, arms, name)
    lacking = f"has no such answer to a problem and seed that {reference} has answered, and is in no pair"
    warnings += [f"{arm} {lacking}" for arm in compared.arms if arm not in paired]
    for sentence in warnings:
        log.warning("%s", sentence)
    folder = Path(next(iter(compared.arm_of))).parent / "judge" / re.sub(r"[^\w.+-]+", "-", name).lstrip(".")
    with lock.hold(folder):
        server = Judge(address, folder / "replies.jsonl")
        num_cached = len(requests.keys() & server.replies.keys())
        log.info("%d questions in %d requests, %d of them in the cache", len(questions), len(requests), num_cached)
        try:
            asyncio.run(server.ask(requests, arguments.concurrency))
        finally:
            replies = {digest: server.replies[digest] for digest in requests if digest in server.replies}
            verdicts = [verdict(row, replies) for row in questions if row["requests"].keys() <= replies.keys()]
            valid = [reply for reply in replies.values() if "text" in reply]
            tokens = {kind: sum(reply[f"{kind}_tokens"] for reply in valid) for kind in ("prompt", "completion")}
            summary = {
                "judge": name,
                "models": sorted({reply["model"] for reply in valid}),
                "answers": [str(selection) for selection in selected],
                "warnings": warnings,
                "against": reference,
                "questions": len(questions),
                "asked": len(verdicts),
                "requests_sent": len(replies) - num_cached,
                "tokens": tokens,
                "cost": sum(price * n / 1e6 for price, n in zip(arguments.prices, tokens.values(), strict=True)),
                **summarize(verdicts, labels),
                "folder": str(folder),
            }
            write_text(folder / "verdicts.jsonl", "".join(json.dumps(row) + "\n" for row in verdicts))
            write_json(folder / "summary.json", summary)
            show(summary)


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for arguments out of range, and without the package openai."""
    if importlib.util.find_spec("openai") is None:
        raise ConfigError("pspo.judge needs the package openai; run pip install 'pspo[judge]'")
    if not ADDRESS.fullmatch(arguments.base_url):  # the error does not have the value, which may hold a key
        rule = "an address such as http://localhost:8000/v1, without user, password and query"
        raise ConfigError(f"--base-url must be {rule}; put the key into the environment variable OPENAI_API_KEY")
    for name in ("limit", "concurrency"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(arguments, name)}")


def read_labels(path: Path | None) -> pd.DataFrame:
    """People's verdicts, one a line, with what they are about. Raises ConfigError."""
    if path is None:
        return pd.DataFrame(columns=[*ABOUT, "verdict"])
    try:
        return pd.DataFrame(map(json.loads, path.read_text(encoding="utf-8").splitlines()))[[*ABOUT, "verdict"]].astype(
            {"verdict": float}
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        rule = "lines of verdicts.jsonl with a person's verdict, a number, in each"
        raise ConfigError(f"--human={path} must hold {rule}: {error!r}") from None


def one_family(compared: Group, arms: Sequence[str], judge: str) -> list[str]:
    """A warning where the judge and a policy are of one family of models, by their names."""
    runs = compared.results.runs.set_index("run").loc[[run for arm in arms for run in compared.arms[arm]]]
    names = {Path(str(name)).name for key in ("name", "hub_id", "path") for name in runs[f"model.{key}"]}
    both = set(FAMILY.findall(judge.lower())) & set(FAMILY.findall(" ".join(names).lower()))
    return [f"judge and policy are of one family, {name}: a judge prefers its own family" for name in sorted(both)]


def show(summary: Mapping[str, Any]) -> None:
    """Print the scores and the pairs, where there are any, then every other number of the summary."""
    for title, rows in (("scores, 1 to 5", summary["scores"]), (f"wins over {summary['against']}", summary["pairs"])):
        cells = [{name: _text(value) for name, value in row.items()} for row in rows]
        sys.stdout.write(f"{title}\n{pd.DataFrame(cells).to_string(index=False)}\n\n" if rows else "")
    for name, value in dotted(summary).items():
        sys.stdout.write("" if isinstance(value, list) else f"{name.replace('_', ' ')}: {_text(value)}\n")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "{:.2f} – {:.2f}".format(*value)
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    """``python -m pspo.judge``."""
    arguments = parse()
    log_to_console()
    with answering(ConfigError, stopped="stopped; the same command asks for the rest"):
        judge(arguments)


if __name__ == "__main__":
    main()
