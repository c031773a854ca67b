"""What this machine can do and what is wrong: the findings of ``python -m pspo.doctor``."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """What one check found: a sentence with its numbers, and the key to set or the command to run."""

    name: str
    verdict: Literal["ok", "warn", "fail"]  # fail: a run would stop or could not be trusted; warn: it would lose by it
    value: str
    remedy: str
    numbers: dict[str, Any]


def found(name: str, text: str, /, *, hint: str = "", warn: str = "", fail: str = "", **numbers: Any) -> Finding:
    """A finding whose ``text`` is filled with its numbers; the kind of its remedy is the verdict."""
    verdict: Literal["ok", "warn", "fail"] = "fail" if fail else "warn" if warn else "ok"
    return Finding(name, verdict, text.format(**numbers), fail or warn or hint, numbers)


def size(num_bytes: float) -> str:
    """``36 GB`` or ``6.1 MB``."""
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def refused(name: str, error: Exception) -> Finding:
    """A failed check: the sentence of its error, whose end is the remedy."""
    reason, _, remedy = " ".join(str(error).split()).partition("; ")
    return Finding(name, "fail", reason, remedy or "see the sentence", {})
