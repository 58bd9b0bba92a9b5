"""``stage=runs``: the runs of an output directory, what their stages have reached, and what they measured."""

from rlhf.runs.table import list_runs

__all__ = ["list_runs"]
