"""Pages of HTML about runs, for a person to read."""

from embedtrain.report.comparison import write_comparison
from embedtrain.report.writing import write_report

__all__ = ["write_comparison", "write_report"]
