"""Sweeps (``train.py -m``): jobs that fail alone, and a table of their results. Nothing here imports torch."""

from rlhf.sweep.callback import SweepTable, exit_code
from rlhf.sweep.job import Monitored, run_job

__all__ = ["Monitored", "SweepTable", "exit_code", "run_job"]
