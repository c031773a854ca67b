"""What became of a group's runs: done, running, waiting, or how each of them ended."""

from pspo.status.state import Group, Row, collect, held

__all__ = ["Group", "Row", "collect", "held"]
