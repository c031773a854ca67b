"""Requests to a server of the OpenAI protocol: many at a time, retried by its client, each reply kept in a cache."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openai

from pspo.base.console import Phase
from pspo.base.files import JsonLines
from pspo.base.schema import ConfigError

TIMEOUT_S = 300.0
"""Longest wait in seconds for a reply, or for its next byte."""
MAX_RETRIES = 5
"""Retries of a request by the client, with growing pauses, or with those that a busy server demands."""
MAX_DETAIL_CHARACTERS = 200
FATAL = (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
"""Errors that every other request would meet too: out of reach, no such key, no such model."""


class Judge:
    """A server and its ``replies`` by the request's digest: the parts of each (``_parts``), or else its ``error``."""

    def __init__(self, base_url: str, cache: Path) -> None:
        """Read the cache, which no other process may write; the key comes from ``OPENAI_API_KEY``."""
        self.base_url, self.takes_schema = base_url, True
        self.key = os.environ.get("OPENAI_API_KEY") or "no-key"  # the client wants one, a local server does not
        self.cache = JsonLines(cache)
        self.cache.cut(self.cache.num_rows())  # drops the half of a line that a killed process left
        self.replies = {row.pop("request"): row for row in self.cache.rows()}

    async def ask(self, requests: Mapping[str, Mapping[str, Any]], concurrency: int) -> None:
        """Get the replies to the requests, by digest, that are not in the cache; an error is not cached.

        Raises ConfigError where the server cannot be used. Tasks, not threads: that error and Ctrl-C cancel what is
        under way.
        """
        lacking = {name: body for name, body in requests.items() if name not in self.replies}
        waiting = iter(lacking.items())
        limits: dict[str, Any] = {"timeout": TIMEOUT_S, "max_retries": MAX_RETRIES}
        async with openai.AsyncOpenAI(api_key=self.key, base_url=self.base_url, **limits) as client:
            with Phase("judging", len(lacking), unit="requests") as phase:

                async def work() -> None:
                    for name, body in waiting:
                        self.replies[name] = reply = await self._reply(client, body, self.takes_schema)
                        if "error" not in reply:
                            self.cache.append({"request": name, **reply})
                        phase(phase.done + 1)

                await asyncio.gather(*(work() for _ in range(concurrency)))

    async def _reply(self, client: openai.AsyncOpenAI, body: Mapping[str, Any], schema: bool) -> dict[str, Any]:
        """One reply, or the error after the last retry; a server that refuses the JSON schema is asked without it."""
        fields: dict[str, Any] = {name: value for name, value in body.items() if schema or name != "response_format"}
        try:
            return _parts(await client.chat.completions.create(**fields))
        except openai.APITimeoutError:
            return {"error": f"time-out: no reply in {TIMEOUT_S:g} s, after {MAX_RETRIES} retries"}
        except FATAL as error:
            why = f"cannot be reached, or refuses the key or the model ({self._safe(error.__cause__ or error)})"
            rest = "replies are kept, and the same command asks for the rest"
            raise ConfigError(f"the judge at {self.base_url} {why}; {rest}") from None
        except openai.APIStatusError as error:
            if error.status_code not in (400, 422) or not schema:
                return {"error": f"HTTP {error.status_code}: {self._safe(error)}"}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            return {"error": f"malformed response: {self._safe(error)}"}
        reply = await self._reply(client, body, schema=False)
        self.takes_schema = self.takes_schema and "error" in reply
        return reply

    def _safe(self, error: BaseException) -> str:
        """An error as one line without the key, which a server may repeat."""
        return " ".join(str(error).replace(self.key, "***").split())[:MAX_DETAIL_CHARACTERS]


def _parts(response: Any) -> dict[str, Any]:
    """What is kept of a response, which the client has not validated."""
    choice, usage = response.choices[0], response.usage
    return {
        "text": str(choice.message.content or ""),
        "refusal": bool(choice.message.refusal) or choice.finish_reason == "content_filter",
        "truncated": choice.finish_reason == "length",
        "model": str(response.model),
        "prompt_tokens": int(usage.prompt_tokens) if usage else 0,
        "completion_tokens": int(usage.completion_tokens) if usage else 0,
    }
