"""Has a language model judge the answers of each arm, by the paper's five metrics, alone and in blinded pairs.

python -m pspo.judge outputs/<group> --base-url http://localhost:8000/v1 --model NAME
"""

import argparse
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from pspo.base.command import answering
from pspo.base.console import log, log_to_console
from pspo.base.files import write_json, write_text
from pspo.base.schema import ConfigError
from pspo.compare.arms import Group, group
from pspo.compare.comparison import DEFAULT_REFERENCE, choose
from pspo.judge.measures import about, summarize
from pspo.judge.questions import METRICS, JudgeError, items, questions_about, verdicts
from pspo.results import load
from pspo.run import lock

LIMITS = {"concurrency": 1, "timeout_s": 0.001, "retries": 0}
"""The smallest values of the arguments that say how the server is asked."""
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
    add("--timeout-s", type=float, default=120.0, help="seconds to wait for a reply (default 120)")
    add("--retries", type=int, default=5, help="retries of a request, with growing pauses (default 5)")
    add("--prices", nargs=2, type=float, default=(0.0, 0.0), metavar=("IN", "OUT"), help="of a million tokens")
    add("--request", default={}, type=json_object, help="fields to change in every request; null removes one")
    return parser.parse_args(words)


def json_object(text: str) -> dict[str, Any]:
    """The content of an argument. Raises ValueError or TypeError, which argparse reports."""
    return dict(json.loads(text))


def judge(arguments: argparse.Namespace) -> None:
    """Ask what the cache does not answer; write and show every verdict there is, also where the judge gives out.

    Judged are the first greedy answers after training. Raises ConfigError before any request.
    """
    check(arguments)
    from pspo.judge.ask import Judge  # imports openai, which ``check`` has found

    people = read_labels(arguments.human) if arguments.human else {}
    compared, name = group(load(arguments.paths)), arguments.model
    selected = choose(compared, {"set": arguments.sets})
    answers = compared.results.answers.merge(pd.DataFrame(map(asdict, selected)).drop(columns="score"))
    answers = answers[answers["run"].isin(compared.runs.index) & (answers["sample"] == 0)]
    arms = [arm for arm, runs in compared.arms.items() if answers["run"].isin(runs).any()]
    reference = compared.arm(arguments.against or (DEFAULT_REFERENCE if DEFAULT_REFERENCE in arms else arms[0]))
    chosen = items(compared, answers, list(dict.fromkeys([*arms, reference])), arguments.limit)
    address = arguments.base_url.rstrip("/")
    questions = questions_about(chosen, reference, arguments.metrics, address, name, arguments.request)
    requests = {digest: request for _, part in questions for digest, request in part.items()}
    warnings = compared.left_out + one_family(compared, arms, name)
    warnings += [f"{arm} has no such answers and is not judged" for arm in compared.arms if arm not in arms]
    for sentence in warnings:
        log.warning("%s", sentence)
    folder = Path(compared.runs.index[0]).parent / "judge" / re.sub(r"[^\w.+-]+", "-", name).lstrip(".")
    with lock.hold(folder):
        server = Judge(address, folder / "replies.jsonl", **{name: getattr(arguments, name) for name in LIMITS})
        num_before = len(server.replies)
        log.info("%d requests, %d of them in the cache", len(requests), len(requests.keys() & server.replies.keys()))
        try:
            server.ask(requests)
        finally:
            rows = verdicts(questions, server.replies)
            replies = [reply for digest in requests if "text" in (reply := server.replies.get(digest, {}))]
            tokens = {kind: sum(reply[f"{kind}_tokens"] for reply in replies) for kind in ("prompt", "completion")}
            summary = {
                "judge": name,
                "base_url": address,
                "models": sorted({reply["model"] for reply in replies}),
                "answers": [str(selection) for selection in selected],
                "warnings": warnings,
                "questions": len(questions),
                "asked": len(rows),
                "requests_sent": len(server.replies) - num_before,
                "tokens": tokens,
                "cost": sum(price * n / 1e6 for price, n in zip(arguments.prices, tokens.values(), strict=True)),
            } | summarize(rows, people)
            write_text(folder / "verdicts.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            write_json(folder / "summary.json", summary)
            show(summary, folder)


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for arguments out of range, and without the package openai."""
    if importlib.util.find_spec("openai") is None:
        raise ConfigError("pspo.judge needs the package openai; run pip install 'pspo[judge]'")
    if not ADDRESS.fullmatch(arguments.base_url):  # the error does not have the value, which may hold a key
        rule = "an address such as http://localhost:8000/v1, without user, password and query"
        raise ConfigError(f"--base-url must be {rule}; put the key into the environment variable OPENAI_API_KEY")
    for name, least in ({"limit": 1} | LIMITS).items():
        if not getattr(arguments, name) >= least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")


def read_labels(path: Path) -> dict[tuple[str | None, ...], float]:
    """People's verdicts, one a line, by what they are about. Raises ConfigError."""
    try:
        labels = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        return {about(label): float(label["verdict"]) for label in labels}
    except (OSError, ValueError, LookupError, TypeError) as error:
        rule = "lines of verdicts.jsonl with a person's verdict, a number, in each"
        raise ConfigError(f"--human={path} must hold {rule}: {error!r}") from None


def one_family(compared: Group, arms: Sequence[str], judge: str) -> list[str]:
    """A warning where the judge and a policy are of one family of models, by their names."""
    runs = compared.results.runs.set_index("run").loc[[run for arm in arms for run in compared.arms[arm]]]
    names = {Path(str(name)).name for key in ("name", "hub_id", "path") for name in runs[f"model.{key}"]}
    both = set(FAMILY.findall(judge.lower())) & set(FAMILY.findall(" ".join(names).lower()))
    return [f"judge and policy are of one family, {name}: a judge prefers its own family" for name in sorted(both)]


def show(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the summary: the scores, the pairs, then what is known of the judge."""
    console = Console(highlight=False, markup=False)
    scores = Table("arm", "metric", "score, 1 to 5", "answers", box=None)
    for row in summary["scores"]:
        scores.add_row(row["arm"], row["metric"].replace("_", " "), _cell(row["mean"], row["ci95"]), str(row["n"]))
    pairs = Table(
        "arm", "over", "metric", "items", "equal", "win rate", "at equal length", "ties", "orders agree", box=None
    )
    for row in summary["pairs"]:
        rates = [_cell(row["win_rate"], row["ci95"]), _cell(row["length_controlled"], row["length_controlled_ci95"])]
        rates += [_cell(row["tie_rate"]), _cell(row["position_consistency"])]
        counts = (str(row["n"]), str(row["equal_answers"]))  # equal answers are ties, without a question
        pairs.add_row(row["arm"], row["against"], row["metric"].replace("_", " "), *counts, *rates)
    console.print(scores, "", pairs, "", sep="\n")
    again, failures = summary["self_agreement"], [f"{n} {kind}" for kind, n in summary["failures"].items()]
    lines = ["{asked} of {questions} questions asked; failures: ".format(**summary) + (", ".join(failures) or "none")]
    lines += [f"{again['n']} scores asked for twice: {_cell(again['equal_rate'])} of them the same"]
    for kind, human in summary["human"].items():
        lines += [f"Cohen's κ with people on {human['n']} verdicts of kind {kind}: {_cell(human['kappa'])}"]
    lines += ["{tokens[prompt]} prompt + {tokens[completion]} completion tokens, cost {cost:.2f}".format(**summary)]
    lines += [f"intervals: 95 %, clustered by problem, for these seeds; verdicts: {folder}"]
    console.print("\n".join(lines), soft_wrap=True)


def _cell(value: float | None, interval: Sequence[float] | None = None) -> str:
    ends = "" if interval is None else " [{:.2f}, {:.2f}]".format(*interval)
    return "–" if value is None else f"{value:.2f}{ends}"


def main() -> None:
    """``python -m pspo.judge``."""
    arguments = parse()
    log_to_console()
    with answering(ConfigError, JudgeError, stopped="stopped; the same command asks for the rest"):
        judge(arguments)


if __name__ == "__main__":
    main()
