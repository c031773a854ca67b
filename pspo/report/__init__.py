"""From a run directory on disk to its figure, its page and its table; nothing here knows how the run was made."""

from pspo.report.curves import write_curves
from pspo.report.metrics import METRICS, meaning
from pspo.report.page import write_report
from pspo.report.table import difference, final_table

__all__ = ["METRICS", "difference", "final_table", "meaning", "write_curves", "write_report"]
