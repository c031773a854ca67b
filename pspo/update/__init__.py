"""How a policy learns from completions: rows, micro-batches, optimizer steps."""

from pspo.update.rows import Learner, make_rows
from pspo.update.step import NonFiniteError, SamplerGapError, UpdateError, check_gap, update

__all__ = ["Learner", "NonFiniteError", "SamplerGapError", "UpdateError", "check_gap", "make_rows", "update"]
