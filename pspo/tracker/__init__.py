"""Metrics of a run: ``metrics.jsonl`` is the truth, Weights & Biases its mirror."""

from pspo.tracker.tracker import Tracker, TrackerConfig, WandbConfig

__all__ = ["Tracker", "TrackerConfig", "WandbConfig"]
