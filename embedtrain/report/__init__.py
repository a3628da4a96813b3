"""One page of HTML about a run, for a person to read."""

from embedtrain.report.page import write_report

__all__ = ["write_report"]
