"""``stage=report``: what a run has done and measured, as one HTML file."""

from rlhf.report.command import write_report, write_run_report

__all__ = ["write_report", "write_run_report"]
