"""Held-out problems: their answers, greedy and sampled, in validation, at a run's end and by a command of its own."""

from pspo.evaluate.answers import HeldOut, answer_sets, completion_row, validate
from pspo.evaluate.config import EvaluateConfig
from pspo.evaluate.summary import summarize

__all__ = ["EvaluateConfig", "HeldOut", "answer_sets", "completion_row", "summarize", "validate"]
