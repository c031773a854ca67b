"""How a policy learns from completions: rows, micro-batches, optimizer steps."""

from pspo.update.rows import Learner, Row, UpdateConfig, make_rows
from pspo.update.step import NonFiniteError, SamplerGapError, UpdateError, accumulate, check_gap, update

__all__ = [
    "Learner",
    "NonFiniteError",
    "Row",
    "SamplerGapError",
    "UpdateConfig",
    "UpdateError",
    "accumulate",
    "check_gap",
    "make_rows",
    "update",
]
