"""Has a language model judge the answers of each arm, by the paper's five metrics, alone and in blinded pairs.

python -m pspo.judge outputs/<group> --base-url http://localhost:8000/v1 --model NAME
"""

import argparse
import asyncio
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pspo.base.command import answering, expanded
from pspo.base.console import Phase, log, log_to_console
from pspo.base.files import JsonLines, write_json, write_text
from pspo.base.schema import ConfigError, dotted
from pspo.compare.arms import ComparedRuns, group
from pspo.compare.comparison import DEFAULT_REFERENCE, choose
from pspo.judge.questions import ABOUT, METRICS, questions_about, sample, summarize, verdict
from pspo.results import load
from pspo.run import lock

ADDRESS = re.compile(r"https?://[^/?#@\s]+(/[^?#\s]*)?")
FAMILY = re.compile(r"qwen|llama|gemma|mistral|mixtral|deepseek|smollm|olmo|granite|falcon|gpt|(?<![a-z])phi")
"""Families of models by words in their names; a judge prefers its own family (Panickssery et al. 2024, 2404.13076)."""
TIMEOUT_S, MAX_RETRIES = 300.0, 5
"""Longest wait in seconds for a reply, or its next byte; retries of a request, with pauses that grow."""
MAX_DETAIL_CHARACTERS = 200  # of an error


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments. Raises ConfigError for a value out of range, and without the package openai."""
    parser = argparse.ArgumentParser(prog="python -m pspo.judge", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        type=expanded,
        help="outputs/<group>, or run directories; verdicts go into the first's group",
    )
    add("--base-url", required=True, help="address of the OpenAI protocol; OPENAI_API_KEY holds the key, if any")
    add("--model", required=True, metavar="NAME", help="the judge's name at that address")
    add("--against", metavar="ARM", help="compare every arm with this one; default: noclip, else the first arm")
    add("--set", action="append", default=[], dest="sets", help="test set; default: all")
    add("--metrics", nargs="+", default=list(METRICS), choices=METRICS, help="default: all")
    add("--limit", type=int, default=100, help="answers of each arm to judge, over problems and seeds (default 100)")
    add("--human", type=expanded, help="lines of verdicts.jsonl with a person's verdict in each, for Cohen's κ")
    add("--concurrency", type=int, default=8, help="requests at a time (default 8)")
    add("--prices", nargs=2, type=float, default=(0.0, 0.0), metavar=("IN", "OUT"), help="of a million tokens")
    arguments = parser.parse_args(words)
    if importlib.util.find_spec("openai") is None:
        raise ConfigError("pspo.judge needs the package openai; run pip install 'pspo[judge]'")
    if not ADDRESS.fullmatch(arguments.base_url):  # the error does not have the value, which may hold a key
        rule = "an address such as http://localhost:8000/v1, without user, password and query"
        raise ConfigError(f"--base-url must be {rule}; put the key into the environment variable OPENAI_API_KEY")
    for name in ("limit", "concurrency"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def judge(arguments: argparse.Namespace) -> None:
    """Ask what the cache does not answer; write and show every verdict there is, also where the judge gives out.

    Judged are the first greedy answers after training. Raises ConfigError.
    """
    labels, compared, name = read_labels(arguments.human), group(load(arguments.paths)), arguments.model
    selected = choose(compared, {"set": arguments.sets})
    answers = sample(compared, selected, arguments.limit)
    arms = [arm for arm in compared.arms if any(row["arm"] == arm for row in answers)]
    reference = compared.arm(arguments.against or (DEFAULT_REFERENCE if DEFAULT_REFERENCE in arms else arms[0]))
    questions = questions_about(answers, reference, arguments.metrics, name)
    requests = {row["request"]: row["body"] for row in questions if row["body"]}
    paired = {reference} | {row["arm"] for row in questions if row["kind"] == "first"}
    warnings = [
        f"{arm} has no answer to a problem and seed of {reference}" for arm in compared.arms if arm not in paired
    ]
    warnings += compared.left_out + one_family(compared, name)
    for sentence in warnings:
        log.warning("%s", sentence)
    folder = Path(compared.runs.index[0]).parent / "judge" / re.sub(r"[^\w.+-]+", "-", name).lstrip(".")
    with lock.hold(folder):
        server = Judge(arguments.base_url, folder / "replies.jsonl")
        num_cached, text = len(requests.keys() & server.replies.keys()), "%d questions in %d requests, %d in the cache"
        log.info(text, len(questions), len(requests), num_cached)
        try:
            asyncio.run(server.ask(requests, arguments.concurrency))
        finally:
            replies = {digest: server.replies[digest] for digest in requests if digest in server.replies}
            verdicts = [verdict(row, replies) for row in questions if not row["body"] or row["request"] in replies]
            valid = [reply for reply in replies.values() if "text" in reply]
            tokens = {kind: sum(reply[kind] for reply in valid) for kind in ("prompt_tokens", "completion_tokens")}
            summary = {
                "judge": name,
                "models": sorted({reply["model"] for reply in valid}),
                "answers": [str(selection) for selection in selected],
                "warnings": warnings,
                "against": reference,
                "questions": len(questions),
                "judged": len(verdicts),
                "requests_sent": len(replies) - num_cached,
                **tokens,
                "cost": sum(price * n / 1e6 for price, n in zip(arguments.prices, tokens.values(), strict=True)),
                **summarize(verdicts, labels),
                "folder": str(folder),
            }
            write_text(folder / "verdicts.jsonl", "".join(json.dumps(row) + "\n" for row in verdicts))
            write_json(folder / "summary.json", summary)
            show(summary)


class Judge:
    """A server of the OpenAI protocol and its ``replies`` by request: the parts of each, or else its ``error``."""

    def __init__(self, base_url: str, cache: Path) -> None:
        """Read the cache, which no other process may write; the key comes from ``OPENAI_API_KEY``."""
        self.url, self.takes_schema, self.cache = base_url, True, JsonLines(cache)
        self.key = os.environ.get("OPENAI_API_KEY") or "no-key"  # the client wants one, a local server does not
        self.cache.cut(self.cache.num_rows())  # drops the half of a line that a killed process left
        self.replies = {row.pop("request"): row for row in self.cache.rows()}

    async def ask(self, requests: Mapping[str, Mapping[str, Any]], concurrency: int) -> None:
        """Get the replies that the cache lacks; an error is not cached. Raises ConfigError for a server of no use.

        Tasks, not threads: that error and Ctrl-C cancel what is under way.
        """
        import openai  # an extra

        uncached = [name for name in requests if name not in self.replies]
        waiting = iter(uncached)
        client = openai.AsyncOpenAI(api_key=self.key, base_url=self.url, timeout=TIMEOUT_S, max_retries=MAX_RETRIES)
        async with client:
            with Phase("judging", len(uncached), unit="requests") as phase:

                async def work() -> None:
                    for name in waiting:
                        self.replies[name] = reply = await self._reply(client, requests[name], self.takes_schema)
                        if "error" not in reply:
                            self.cache.append({"request": name, **reply})
                        phase(phase.done + 1)

                await asyncio.gather(*(work() for _ in range(concurrency)))

    async def _reply(self, client: Any, body: Mapping[str, Any], schema: bool) -> dict[str, Any]:
        """One reply, or the error after the last retry; a server that refuses the JSON schema is asked without it."""
        import openai

        try:
            fields = {name: value for name, value in body.items() if schema or name != "response_format"}
            response = await client.chat.completions.create(**fields)
            choice, usage = response.choices[0], response.usage
            return {
                "text": str(choice.message.content or "").encode(errors="replace").decode(),
                "refusal": bool(choice.message.refusal) or choice.finish_reason == "content_filter",
                "truncated": choice.finish_reason == "length",
                "model": str(response.model),
                "prompt_tokens": int(usage.prompt_tokens) if usage else 0,
                "completion_tokens": int(usage.completion_tokens) if usage else 0,
            }
        except openai.APITimeoutError:
            return {"error": f"time-out: no reply in {TIMEOUT_S:g} s, after {MAX_RETRIES} retries"}
        except (openai.APIError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            detail = " ".join(str(error.__cause__ or error).replace(self.key, "***").split())  # servers repeat the key
            code, detail = getattr(error, "status_code", None), detail[:MAX_DETAIL_CHARACTERS]
            if not isinstance(error, openai.APIError):
                return {"error": f"malformed response: {detail}"}
            if code in (None, 401, 403, 404):  # which every other request would meet too
                why = f"cannot be reached, or refuses the key or the model ({detail})"
                rest = "replies are kept, and the same command asks for the rest"
                raise ConfigError(f"the judge at {self.url} {why}; {rest}") from None
            if code not in (400, 422) or not schema:
                return {"error": f"HTTP {code}: {detail}"}
        reply = await self._reply(client, body, schema=False)
        self.takes_schema = self.takes_schema and "error" in reply
        return reply


def read_labels(path: Path | None) -> pd.DataFrame:
    """People's verdicts, one a line, with what they are about. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
        labels = pd.DataFrame(map(json.loads, lines), columns=None if lines else [*ABOUT, "verdict"])
        return labels[[*ABOUT, "verdict"]].astype({"verdict": float}).drop_duplicates(ABOUT)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"--human={path} must hold lines of verdicts.jsonl with a person's verdict: {error!r}"
        ) from None


def one_family(compared: ComparedRuns, judge: str) -> list[str]:
    """A warning where the judge and a policy are of one family of models, by their names."""
    names = " ".join(
        Path(str(name)).name for key in ("name", "hub_id", "path") for name in compared.runs[f"model.{key}"]
    )
    both = set(FAMILY.findall(judge.lower())) & set(FAMILY.findall(names.lower()))
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
    log_to_console()
    with answering(ConfigError, stopped="stopped; the same command asks for the rest"):
        judge(parse())


if __name__ == "__main__":
    main()
