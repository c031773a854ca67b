"""The states of a group's runs: done, running, waiting, or how each run ended."""

from pspo.status.state import Group, Row, collect

__all__ = ["Group", "Row", "collect"]
