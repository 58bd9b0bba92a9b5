"""``stage=report``: what a run has done and measured, as one HTML file."""

from rlhf.report.command import NAME, write_report, write_run_report

__all__ = ["NAME", "write_report", "write_run_report"]
