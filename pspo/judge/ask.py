"""Requests to a server of the OpenAI protocol: many at a time, retried with back-off, each reply bought once."""

import asyncio
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import openai

from pspo.base.console import Phase
from pspo.base.files import JsonLines
from pspo.judge.questions import JudgeError

LONGEST_RETRY_AFTER_S = 120.0
"""The client waits as long as a Retry-After says, up to this; where it says more, the request has failed."""
MAX_FAILED_REQUESTS_IN_A_ROW = 20
MAX_DETAIL_CHARACTERS = 200

Request = Mapping[str, Any]


class Judge:
    """A server and its ``replies`` by the request's digest: the parts of each (``_content``), or else its ``error``."""

    def __init__(self, base_url: str, cache: Path, concurrency: int, timeout_s: float, retries: int) -> None:
        """Read the cache, which no other process may write; the key comes from ``OPENAI_API_KEY``."""
        self.base_url, self.concurrency, self.timeout_s, self.retries = base_url, concurrency, timeout_s, retries
        self.key = os.environ.get("OPENAI_API_KEY") or "no-key"  # the client wants one, a local server does not
        self.cache = JsonLines(cache)
        self.cache.cut(self.cache.num_rows())  # drops the half of a line that a killed process left
        self.replies = {row.pop("request"): row for row in self.cache.rows()}
        self.takes_schema, self.num_failed_in_a_row = True, 0

    def ask(self, requests: Mapping[str, Request]) -> None:
        """Get the replies to the requests, given by digest, that are not in the cache. Raises JudgeError."""
        if missing := {name: request for name, request in requests.items() if name not in self.replies}:
            asyncio.run(self._ask(missing))

    async def _ask(self, requests: Mapping[str, Request]) -> None:
        # Tasks, not threads: Ctrl-C and a JudgeError cancel what is under way, and the cache needs no lock.
        waiting = iter(requests.items())
        limits: dict[str, Any] = {"timeout": self.timeout_s, "max_retries": self.retries}
        async with openai.AsyncOpenAI(api_key=self.key, base_url=self.base_url, **limits) as client:
            with Phase("judging", len(requests), unit="requests") as phase:
                await asyncio.gather(*(self._work(client, waiting, phase) for _ in range(self.concurrency)))

    async def _work(self, client: openai.AsyncOpenAI, waiting: Iterator[tuple[str, Request]], phase: Phase) -> None:
        for name, request in waiting:
            self.replies[name] = reply = await self._reply(client, request, self.takes_schema)
            self.num_failed_in_a_row = self.num_failed_in_a_row + 1 if "error" in reply else 0
            if "error" not in reply:  # an error is not cached: the same command asks again
                self.cache.append({"request": name, **reply})
            if self.num_failed_in_a_row == MAX_FAILED_REQUESTS_IN_A_ROW:
                raise self._stop(f"failed {self.num_failed_in_a_row} times in a row, the last: {reply['error']}")
            phase(phase.done + 1)

    async def _reply(self, client: openai.AsyncOpenAI, request: Request, schema: bool) -> dict[str, Any]:
        """One reply, or the error after the last retry. Raises JudgeError where every other request would fail too."""
        body = {name: value for name, value in request.items() if schema or name != "response_format"}
        longest_s = self.timeout_s + self.retries * (self.timeout_s + LONGEST_RETRY_AFTER_S)
        try:
            async with asyncio.timeout(longest_s):  # the client's own time-out begins anew with every byte
                return _content((await client.post("/chat/completions", cast_to=httpx2.Response, body=body)).text)
        except (openai.APITimeoutError, TimeoutError):
            return {"error": f"time-out: no reply in {self.timeout_s:g} s, after {self.retries} retries"}
        except openai.APIConnectionError as error:
            why = self._safe(error.__cause__ or error)
            raise self._stop(f"cannot be reached after {self.retries} retries: {why}") from None
        except openai.APIStatusError as error:
            if error.status_code in (401, 403, 404):
                raise self._stop(f"refuses the key or the model: {self._safe(error)}") from None
            if error.status_code not in (400, 422) or "response_format" not in body:
                return {"error": f"HTTP {error.status_code}: {self._safe(error)}"}
        reply = await self._reply(client, request, schema=False)
        self.takes_schema = self.takes_schema and "error" in reply
        return reply

    def _stop(self, why: str) -> JudgeError:
        return JudgeError(
            f"the judge at {self.base_url} {why}; replies are kept, and the same command asks for the rest"
        )

    def _safe(self, error: BaseException) -> str:
        """An error as one line without the key, which a server may repeat."""
        return " ".join(str(error).replace(self.key, "***").split())[:MAX_DETAIL_CHARACTERS]


def _content(text: str) -> dict[str, Any]:
    """The parts of a server's response that are kept; an error where it does not follow the protocol."""
    try:
        response = json.loads(text)
        choice, usage = response["choices"][0], response.get("usage") or {}
        return {
            "text": str(choice["message"].get("content") or ""),
            "refusal": bool(choice["message"].get("refusal")) or choice.get("finish_reason") == "content_filter",
            "truncated": choice.get("finish_reason") == "length",
            "model": str(response.get("model")),
            **{name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")},
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return {"error": f"malformed response: {error!r}"[:MAX_DETAIL_CHARACTERS]}
