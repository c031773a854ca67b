"""Draw the gradient weights of all objectives and the effect of alpha on a run.

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
        weights, table, alpha = (directory / name for name in ("objectives.png", "objectives.md", "alpha.png"))
        picture.draw_weights(weights)
        picture.draw_alpha(alpha)
        write_text(table, picture.table() + "\n")
        sys.stdout.write(f"{weights}\n{table}\n{alpha}\n")


if __name__ == "__main__":
    main()
