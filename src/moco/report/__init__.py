"""The report of a run: its tables, pictures and HTML page."""

from moco.report.page import compare, report

__all__ = ["compare", "report"]
