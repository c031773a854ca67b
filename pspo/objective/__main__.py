"""Draw the gradient weights of all objectives, and what alpha does.

python -m pspo.objective [directory]
"""

import argparse
import sys
from pathlib import Path

from pspo.base.command import answering
from pspo.base.files import write_text
from pspo.objective import picture


def main() -> None:
    """Write ``objectives.png``, ``objectives.md`` and ``alpha.png``."""
    parser = argparse.ArgumentParser(prog="python -m pspo.objective", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path("outputs/objective"), help="where to write")
    with answering():
        directory: Path = parser.parse_args().directory
        directory.mkdir(parents=True, exist_ok=True)
        picture.draw_weights(directory / "objectives.png")
        picture.draw_alpha(directory / "alpha.png")
        write_text(directory / "objectives.md", picture.table() + "\n")
        for name in ("objectives.png", "objectives.md", "alpha.png"):
            sys.stdout.write(f"{directory / name}\n")


if __name__ == "__main__":
    main()
