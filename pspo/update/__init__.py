"""How a policy learns from completions: rows, micro-batches, optimizer steps."""

from pspo.update.step import Learner, NonFiniteError, Update, accumulate, update

__all__ = ["Learner", "NonFiniteError", "Update", "accumulate", "update"]
