"""Stop strings: a completion ends with the token that completes one of them, and its text before that string."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from torch import Tensor

MARGIN_TOKENS = 8
"""Tokens read before those that can spell a stop string: halves of a letter, special tokens, which have no text."""


class StopStrings:
    """The strings of ``rollout.stop``, looked for in the text of token ids without their special tokens."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self.strings, self.tokenizer = strings, tokenizer

    def text(self, token_ids: Sequence[int]) -> str:
        """The decoded tokens, up to the first stop string."""
        text = str(self.tokenizer.decode(token_ids, skip_special_tokens=True))
        return text[: min((at for at in map(text.find, self.strings) if at >= 0), default=len(text))]

    def cut(self, ids: list[int], logprobs: list[float], finished: bool) -> tuple[list[int], list[float], bool]:
        """A row of tokens up to the one that completes a stop string, which finishes the row."""
        if not self._holds(ids):
            return ids, logprobs, finished
        length = bisect_left(range(len(ids)), True, key=lambda n: self._holds(ids[:n]))
        return ids[:length], logprobs[:length], True

    def completed(self, token_BT: Tensor) -> list[bool]:
        """Whether the last tokens of each row complete a stop string; a token spells one byte of it at least."""
        last = max(len(string.encode()) for string in self.strings) + MARGIN_TOKENS
        ends = self.tokenizer.batch_decode(token_BT[:, -last:].tolist(), skip_special_tokens=True)
        near = [any(string in end for string in self.strings) for end in ends]
        return [found and self._holds(ids.tolist()) for found, ids in zip(near, token_BT, strict=True)]

    def _holds(self, token_ids: Sequence[int]) -> bool:
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return any(string in text for string in self.strings)
