"""What the benchmarks share: medians with their spread, matrix products, and where results go.

A row of the README's table is what was measured, of ours and beside it, their ratio and the target; see ``row``.
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pspo.host import environment
from pspo.host.speed import product_s

RESULTS = Path(__file__).parent / "results"
FACTORS_AT = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0}
FACTORS_AT |= {getattr(torch.ops.aten, name): 1 for name in ("addmm", "addmm_", "baddbmm", "baddbmm_")}
Product = tuple[int, int, int, int, torch.dtype]
"""A matrix product: batch, rows, inner, columns and dtype."""


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, ``key=value`` words apart from it as ``overrides``."""
    words = sys.argv[1:]
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    return parser.parse_args([w for w in words if w not in overrides], argparse.Namespace(overrides=overrides))


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Of two things measured in turns: the median of the rounds' ratios, with its spread."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


def alone(module: str, *words: str) -> Any:
    """What a benchmark prints on its last line, as JSON, in a process of its own."""
    command = [sys.executable, "-m", module, *words]
    made = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if made.returncode:
        sys.exit(made.returncode)  # it has said why
    return json.loads(made.stdout.splitlines()[-1])


class Products(TorchDispatchMode):
    """Counts the matrix products made under it. Fused attention counts as its own: two forward, four backward."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, kwargs = func.overloadpacket, kwargs or {}
        name = packet.__name__
        if packet in FACTORS_AT:
            a, b = args[FACTORS_AT[packet] :][:2]
            self._add(len(a) if a.ndim == 3 else 1, a.shape[-2], a.shape[-1], b.shape[-1], a.dtype)
        elif name.startswith("_scaled_dot_product") and "math" not in name:
            backward = "backward" in name
            query, key = args[backward : backward + 2]
            batch, q, s, d = query.shape[0] * query.shape[1], query.shape[-2], key.shape[-2], query.shape[-1]
            for shape in ((q, d, s), (q, s, d), *[(s, q, d)] * 2 * backward):
                self._add(batch, *shape, query.dtype)
        else:  # under inference mode what is made of other operators comes here whole
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        return func(*args, **kwargs)

    def _add(self, *product: Any) -> None:
        self.count[product] += 1


def products(work: Callable[[], Any]) -> Counter[Product]:
    """The matrix products of one call, and how often each is made."""
    with Products() as found:
        work()
    return found.count


def floor_s(count: Counter[Product], device: torch.device) -> float:
    """Seconds of matrix products, each measured alone at its shape on this machine."""
    return sum(times * product_s(*product, device) for product, times in count.items())


def row(
    what: str, ours: dict[str, float], beside: str, theirs: dict[str, float], ratio: dict[str, float], target: str = ""
) -> dict[str, Any]:
    """A row of the README's table; ``what`` ends with the unit, ``beside`` names what stands beside ours."""
    return {"what": what, "ours": ours, "beside": beside, "theirs": theirs, "ratio": ratio, "target": target}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a table: medians, and the ratio with its least and greatest."""
    lines = ["| what | ours | beside it | ratio [least, greatest], rounds | target |", "|---|---|---|---|---|"]
    for made in rows:
        ratio = made["ratio"]
        spread = f" [{_short(ratio['min'])}, {_short(ratio['max'])}], {ratio['n']}" if ratio["n"] > 1 else ""
        cells = [made["what"], _short(made["ours"]["median"]), f"{_short(made['theirs']['median'])} ({made['beside']})"]
        lines.append("| " + " | ".join([*cells, _short(ratio["median"]) + spread, made["target"] or "–"]) + " |")
    return "\n".join(lines)


def _short(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{float(f'{value:.3g}'):g}"


def write(name: str, rows: list[dict[str, Any]], **details: Any) -> None:
    """Keep rows and details with the machine and the versions they were measured on, and print the rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = environment.describe(torch.get_num_threads(), device)
    about["packages"]["trl"] = _version("trl")
    RESULTS.mkdir(exist_ok=True)
    result = {"rows": rows, **details, "date": time.strftime("%Y-%m-%d"), "environment": about}
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(markdown(rows))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
