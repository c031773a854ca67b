"""What this machine can do, what is wrong with it, and the key to set, in two minutes.

python -m pspo.doctor [--json] [group=option ...] [key=value ...]

The words are those of python -m pspo.run and choose the model that is tried, by default the embedded one; a model of
the hub has to be in the cache, as python -m pspo.prefetch puts it there. Nothing is changed, and a run never takes
another path by itself. ok: nothing to do; warn: a run would lose by it; fail: a run would stop, or could not be
trusted. Exit status 0 where nothing fails, else 1; 2 for a mistake in the words.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pspo.base.command import answering
from pspo.doctor import Finding, refused
from pspo.doctor.versions import versions

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
WIDTH = 80  # columns


def examine(words: Sequence[str]) -> Iterator[Finding]:
    """Every finding, as it is made. Raises ConfigError for words that no run takes."""
    yield versions()
    import torch
    from huggingface_hub import constants

    from pspo.config import compose
    from pspo.doctor import machine, model
    from pspo.run.__main__ import EXPECTED

    config = compose([word for word in words if not word.startswith("hydra")])

    def tried(name: str, check: Callable[..., Finding | Iterable[Finding]], *given: Any) -> Iterator[Finding]:
        try:
            made = check(*given)
            yield from [made] if isinstance(made, Finding) else made
        except (*EXPECTED, OSError, MemoryError, torch.OutOfMemoryError) as error:
            yield refused(name, error)

    yield from tried("device", machine.device, config)
    yield from tried("memory", machine.memory)
    yield from tried("threads", machine.threads, config)
    yield from tried("caches", machine.caches)
    yield from tried("hub", machine.hub)
    yield from tried("W&B", machine.wandb, config)
    yield from tried("SLURM", machine.cluster, words)
    (disk,) = tried("disk", machine.disk, config)
    yield disk
    constants.HF_HUB_OFFLINE = True  # a doctor downloads nothing
    yield from tried("model", model.checks, config, Path(disk.numbers["folder"]), disk.numbers["bytes_per_s"])


def show(findings: Iterable[Finding]) -> list[Finding]:
    """Print each finding as it comes, in ``WIDTH`` columns; returns them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, shown = Console(width=WIDTH), list[Finding]()
    for finding in findings:
        grid = Table.grid(padding=(0, 2))
        for width in (4, 14, WIDTH - 22):
            grid.add_column(width=width, overflow="fold")
        remedy = Text(f"\n→ {finding.remedy}" if finding.remedy else "", "bold" if finding.verdict != "ok" else "")
        grid.add_row(Text(finding.verdict, STYLES[finding.verdict]), finding.name, Text(finding.value) + remedy)
        console.print(grid)
        shown.append(finding)
    return shown


def main() -> None:
    """``python -m pspo.doctor``."""
    words = [word for word in sys.argv[1:] if word != "--json"]
    if {"-h", "--help"} & set(words):
        sys.stdout.write(__doc__ or "")
        return
    from pspo.base.schema import ConfigError

    with answering(ConfigError):
        findings = list(examine(words)) if "--json" in sys.argv else show(examine(words))
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False) + "\n")
    sys.exit(int(any(finding.verdict == "fail" for finding in findings)))


if __name__ == "__main__":
    main()
