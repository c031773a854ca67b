"""Draw the gradient weights of all objectives and the effect of alpha on a run."""

import argparse
import sys
from pathlib import Path

from pspo.base.command import answering
from pspo.base.files import write_text
from pspo.objective import picture


def main() -> None:
    """Write ``objectives.png``, ``objectives.md`` and ``alpha.png``."""
    parser = argparse.ArgumentParser(prog="python -m pspo.objective", description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("outputs/objective"), help="where to write")
    with answering():
        directory: Path = parser.parse_args().directory
        directory.mkdir(parents=True, exist_ok=True)
        picture.draw_weights(directory / "objectives.png")
        picture.draw_alpha(directory / "alpha.png")
        write_text(directory / "objectives.md", picture.table() + "\n")
        sys.stdout.write(f"objectives.png, objectives.md and alpha.png are in {directory}\n")


if __name__ == "__main__":
    main()
