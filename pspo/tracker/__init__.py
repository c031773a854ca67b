"""Metrics of a run: ``metrics.jsonl`` is the truth, Weights & Biases its mirror."""

from pspo.tracker.config import TrackerConfig, WandbConfig
from pspo.tracker.jsonl import Tracker

__all__ = ["Tracker", "TrackerConfig", "WandbConfig"]
