"""Has a language model judge the answers of each arm, by the paper's five metrics, alone and in blinded pairs.

python -m pspo.judge outputs/<group> --base-url http://localhost:8000/v1 --model NAME
"""

import argparse
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from pspo.base.command import answering
from pspo.base.console import log, log_to_console
from pspo.base.files import write_json, write_text
from pspo.base.schema import ConfigError
from pspo.compare.arms import Group, group
from pspo.judge.measures import summarize
from pspo.judge.questions import METRICS, JudgeError
from pspo.judge.verdicts import choose, fitting, questions_about, verdicts
from pspo.results import load

FAMILY = re.compile(r"qwen|llama|gemma|mistral|mixtral|deepseek|smollm|olmo|granite|falcon|gpt|(?<![a-z])phi")
"""Families of models by words in their names; a judge prefers its own family (Panickssery et al. 2024, 2404.13076)."""


AT_LEAST = {"limit": 1, "concurrency": 1, "retries": 0, "timeout_s": 0.001}


class Label(BaseModel):
    """A person's verdict on what a verdict of the judge is about: the same line with another number."""

    metric: str
    set: str
    problem: str
    run: str
    against_run: str | None = None
    verdict: float


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m pspo.judge", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="outputs/<group>, or several; verdicts go into the first")
    add("--base-url", required=True, help="address of the OpenAI protocol; OPENAI_API_KEY holds the key, if any")
    add("--model", required=True, metavar="NAME", help="the judge's name at that address")
    add("--pairs", nargs=2, action="append", metavar="ARM", help="compare two arms (default: each arm with noclip)")
    add("--metrics", nargs="+", default=list(METRICS), choices=METRICS, help="default: all")
    add("--limit", type=int, default=100, help="answers of each arm to judge, over problems and seeds (default 100)")
    for name, default in (("set", None), ("evaluation", "greedy"), ("when", "after")):
        add(f"--{name}", default=default, help=f"judge answers of this {name} (default {default or 'all'})")
    add("--temperature", type=float, default=0.0, help="judge answers of this temperature (default 0)")
    add("--human", type=Path, help="lines of verdicts.jsonl with a person's verdict in each, for Cohen's κ")
    add("--concurrency", type=int, default=8, help="requests at a time (default 8)")
    add("--timeout-s", type=float, default=120.0, help="seconds to wait for a reply (default 120)")
    add("--retries", type=int, default=5, help="retries of a request, with growing pauses (default 5)")
    add("--prices", nargs=2, type=float, default=(0.0, 0.0), metavar=("IN", "OUT"), help="of a million tokens")
    add("--request", default="{}", metavar="JSON", help="fields to change in every request; null removes one")
    return parser.parse_args(words)


def judge(arguments: argparse.Namespace) -> None:
    """Ask what the cache does not answer; write and show every verdict there is, also where the judge gives out."""
    changes, people = _check(arguments), _labels(arguments.human) if arguments.human else []
    from pspo.judge.ask import Judge  # imports openai, which _check has found

    compared = group(load(arguments.paths))
    chosen = {name: getattr(arguments, name) for name in ("evaluation", "when", "temperature", "set")}
    wanted = {name: value for name, value in chosen.items() if value is not None}
    answers = fitting(compared, wanted)
    known = {arm: bool(answers["run"].isin(runs).any()) for arm, runs in compared.arms.items()}
    reference = "noclip" if known.get("noclip") else next(arm for arm in known if known[arm])
    pairs = [(compared.arm(one), compared.arm(other)) for one, other in arguments.pairs or ()]
    pairs = pairs or [(arm, reference) for arm in known if known[arm] and arm != reference]
    arms = list(dict.fromkeys(arm for pair in pairs for arm in pair)) or [reference]
    items = choose(compared, answers, arms, arguments.limit)
    address = arguments.base_url.rstrip("/")
    questions = questions_about(items, pairs, arguments.metrics, address, arguments.model, changes)
    requests = {name: request for question in questions for name, request in question.requests.items()}
    folder = Path(answers["run"].iloc[0]).parent / "judge" / re.sub(r"[^\w.+-]+", "-", arguments.model).lstrip(".")
    folder.mkdir(parents=True, exist_ok=True)
    limits = (arguments.concurrency, arguments.timeout_s, arguments.retries)
    server = Judge(address, folder / "replies.jsonl", *limits)
    warnings = compared.left_out + [f"{arm} has no such answers and is not judged" for arm in known if not known[arm]]
    for sentence in (warnings := warnings + _one_family(compared, arms, arguments.model)):
        log.warning("%s", sentence)
    log.info("%d requests, %d of them in the cache", len(requests), len(requests.keys() & server.replies.keys()))
    try:
        server.ask(requests)
    finally:
        rows = verdicts(questions, server.replies)
        replies = [reply for name in requests if "text" in (reply := server.replies.get(name, {}))]
        tokens = {kind: sum(reply[f"{kind}_tokens"] for reply in replies) for kind in ("prompt", "completion")}
        summary = {
            "judge": arguments.model,
            "base_url": address,
            "models": sorted({reply["model"] for reply in replies}),
            "answers": wanted | {"items": len(items)},
            "warnings": warnings,
            "questions": len(questions),
            "asked": len(rows),
            "requests_sent": server.num_sent,
            "tokens": tokens,
            "cost": sum(price * n / 1e6 for price, n in zip(arguments.prices, tokens.values(), strict=True)),
        } | summarize(rows, people)
        write_text(folder / "verdicts.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_json(folder / "summary.json", summary)
        show(summary, folder)


def show(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the summary: a table of scores, a table for each pair, then what is known of the judge."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    scores = Table("arm", "metric", "score, 1 to 5", "answers", box=None)
    for row in summary["scores"]:
        scores.add_row(row["arm"], row["metric"].replace("_", " "), _cell(row["mean"], row["ci95"]), str(row["n"]))
    console.print(scores)
    for pair in dict.fromkeys((row["arm"], row["against"]) for row in summary["pairs"]):
        table = Table("metric", "win rate", "at equal length", "ties", "orders agree", box=None)
        for row in summary["pairs"]:
            if (row["arm"], row["against"]) == pair:
                controlled = _cell(row["length_controlled"], row["length_controlled_ci95"])
                judged = [_cell(row[name]) for name in ("tie_rate", "position_consistency")]
                table.add_row(row["metric"].replace("_", " "), _cell(row["win_rate"], row["ci95"]), controlled, *judged)
        console.print(f"\n{pair[0]} over {pair[1]}", table, sep="\n")
    again, tokens = summary["self_agreement"], summary["tokens"]
    failures = ", ".join(f"{n} {kind}" for kind, n in summary["failures"].items()) or "none"
    console.print(f"\n{summary['asked']} of {summary['questions']} questions asked; failures: {failures}")
    console.print(f"{again['n']} scores asked for twice: {_cell(again['equal_rate'])} of them the same")
    for kind, human in summary["human"].items():
        console.print(f"Cohen's κ with people on {human['n']} verdicts of kind {kind}: {_cell(human['kappa'])}")
    console.print(f"{tokens['prompt']} prompt + {tokens['completion']} completion tokens, cost {summary['cost']:.2f}")
    console.print(f"intervals: 95 %, clustered by problem, for these seeds; verdicts: {folder}")


def _cell(value: float | None, interval: Sequence[float] | None = None) -> str:
    ends = "" if interval is None else " [{:.2f}, {:.2f}]".format(*interval)
    return "–" if value is None else f"{value:.2f}{ends}"


def _check(arguments: argparse.Namespace) -> dict[str, Any]:
    """The changes to requests. Raises ConfigError for arguments out of range, and without the package openai."""
    if importlib.util.find_spec("openai") is None:
        raise ConfigError("pspo.judge needs the package openai; run pip install 'pspo[judge]'")
    address = urlsplit(arguments.base_url)
    if address.scheme not in ("http", "https") or not address.hostname or "@" in address.netloc or address.query:
        raise ConfigError(  # without the value, which may hold a key
            "--base-url must be an address such as http://localhost:8000/v1, without user, password and query; put "
            "the key into the environment variable OPENAI_API_KEY"
        )
    for name, least in AT_LEAST.items():
        if not getattr(arguments, name) >= least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    try:
        changes = json.loads(arguments.request)
    except ValueError:
        changes = None
    if not isinstance(changes, dict) or {"model", "messages", "stream"} & changes.keys():
        rule = "a JSON object of fields other than model, messages and stream"
        raise ConfigError(f"--request must be {rule}, such as '{{\"temperature\": null}}', got {arguments.request}")
    return changes


def _labels(path: Path) -> list[dict[str, Any]]:
    """People's verdicts, one a line. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [Label.model_validate_json(line).model_dump() for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        rule = "lines of verdicts.jsonl with a person's verdict, a number, in each"
        raise ConfigError(f"--human={path} must hold {rule}: {error}") from None


def _one_family(compared: Group, arms: Sequence[str], judge: str) -> list[str]:
    """A warning where the judge and a policy are of one family of models, by their names."""
    runs = compared.results.runs.set_index("run").loc[[run for arm in arms for run in compared.arms[arm]]]
    names = {Path(str(name)).name for key in ("name", "hub_id", "path") for name in runs[f"model.{key}"]}
    both = set(FAMILY.findall(judge.lower())) & set(FAMILY.findall(" ".join(names).lower()))
    return [f"judge and policy are of one family, {name}: a judge prefers its own family" for name in sorted(both)]


def main() -> None:
    """``python -m pspo.judge``."""
    arguments = parse()
    log_to_console()
    with answering(ConfigError, JudgeError, stopped="stopped; the same command asks for the rest"):
        judge(arguments)


if __name__ == "__main__":
    main()
