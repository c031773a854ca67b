"""From a run directory on disk to its figure, its page and its table; nothing here knows how the run was made."""

from pspo.report.curves import write_curves
from pspo.report.metrics import METRICS, meaning
from pspo.report.page import difference, final_table, write_report

__all__ = ["METRICS", "difference", "final_table", "meaning", "write_curves", "write_report"]
