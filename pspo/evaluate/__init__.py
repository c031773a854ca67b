"""Held-out problems: their answers, greedy and sampled, in validation, at a run's end and by a command of its own."""

from pspo.evaluate.answers import EvaluateConfig, answer, completion_row, described, summarize, validate

__all__ = ["EvaluateConfig", "answer", "completion_row", "described", "summarize", "validate"]
