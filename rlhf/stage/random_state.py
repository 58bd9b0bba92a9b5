"""State of PyTorch's random number generators, saved in checkpoints so that a resumed run draws the same numbers."""

from typing import Any

import torch


def get_random_state() -> dict[str, Any]:
    """Return the state of the CPU generator and of every CUDA generator."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state from ``get_random_state``.

    CUDA states are restored only if this process sees as many CUDA devices as the process that saved them.
    """
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([device_state.cpu() for device_state in state["cuda"]])
