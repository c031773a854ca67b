"""This list of the commands."""

import sys

from pspo import __doc__ as about
from pspo.base.command import overview

if __name__ == "__main__":
    sys.stdout.write(f"{about}\n\n{overview()}\nEach of them has --help.\n")
