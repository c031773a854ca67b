"""``python -m pspo.objective [directory]``: the gradient weights of all objectives, and what alpha does."""

import sys
from pathlib import Path

from pspo.base.files import write_text
from pspo.objective import picture


def main() -> None:
    """Write ``objectives.png``, ``objectives.md`` and ``alpha.png``."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/objective")
    directory.mkdir(parents=True, exist_ok=True)
    picture.draw_weights(directory / "objectives.png")
    picture.draw_alpha(directory / "alpha.png")
    write_text(directory / "objectives.md", picture.table() + "\n")
    for name in ("objectives.png", "objectives.md", "alpha.png"):
        sys.stdout.write(f"{directory / name}\n")


if __name__ == "__main__":
    main()
