"""A laboratory for what should stand where PPO and GRPO clip the importance ratio."""

import os
import sys

__version__ = "0.1.0"

# OpenMP threads spin at barriers, which on a shared machine can cost many times the neighbour's share. Spinning so long
# and no longer keeps the speed of an idle machine (measured in LOG.md). It is read when torch is imported, hence here.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if sys.argv[:1] == ["-m"]:  # under python -m, while Python looks for the module to run
    from pspo.base.command import refuse_other_modules

    refuse_other_modules(next((word for word in sys.orig_argv if word.startswith("pspo.")), ""))
