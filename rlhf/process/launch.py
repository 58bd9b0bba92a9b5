"""The rank of this process before the ranks are connected. Can be read without importing torch."""

import os

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # of torchrun, SLURM and Lightning


def rank_in_environment() -> int:
    """Return the rank that the launcher has put into the environment of this process; 0 without a launcher."""
    return next((int(rank) for name in RANK_VARIABLES if (rank := os.environ.get(name))), 0)


def is_launched() -> bool:
    """Return whether a launcher has started this process as a rank of a run."""
    return any(name in os.environ for name in RANK_VARIABLES)
