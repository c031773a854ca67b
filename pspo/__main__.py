"""This list of the commands."""

import sys

from pspo.base.command import overview

sys.stdout.write(overview() + "Each of them has --help.\n")
