"""Metrics of a run: ``metrics.jsonl`` is the truth, Weights & Biases its mirror."""

from pspo.tracker.jsonl import Tracker, TrackerConfig, WandbConfig

__all__ = ["Tracker", "TrackerConfig", "WandbConfig"]
