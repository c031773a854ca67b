"""A laboratory for what should stand where PPO and GRPO clip the importance ratio."""

import os

__version__ = "0.1.0"

# OpenMP threads spin at barriers by default: on a shared machine that costs many times the neighbour's share.
# It is read when torch is imported, so it stands here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
