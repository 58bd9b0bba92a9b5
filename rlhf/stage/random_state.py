"""State of the random number generators, saved in checkpoints so that a resumed run draws the same numbers."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def get_random_state() -> dict[str, Any]:
    """Return the state of PyTorch's generators, of ``random`` and of NumPy's global generator.

    PyTorch has a generator for the CPU and one for each accelerator device. The states of the other two consist of
    plain Python objects, which ``torch.load(weights_only=True)`` opens.
    """
    accelerator = _accelerator()
    if accelerator is None:
        states = []
    elif hasattr(accelerator, "get_rng_state_all"):
        states = accelerator.get_rng_state_all()
    else:  # Apple's devices have a single generator.
        states = [accelerator.get_rng_state()]
    numpy_state: Any = numpy.random.get_state()
    name, key, *rest = numpy_state
    return {
        "cpu": torch.get_rng_state(),
        "accelerator": states,
        "python": random.getstate(),
        "numpy": (name, key.tolist(), *rest),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state from ``get_random_state``.

    The states of accelerator devices are restored only if this process sees as many devices as the process that saved
    them. Older checkpoints lack the states of ``random`` and of NumPy.
    """
    torch.set_rng_state(state["cpu"].cpu())
    if "python" in state:
        version, numbers, normal = state["python"]
        random.setstate((version, tuple(numbers), normal))  # A dump has lists in place of tuples.
    if "numpy" in state:
        numpy.random.set_state(tuple(state["numpy"]))
    states, accelerator = [device_state.cpu() for device_state in state["accelerator"]], _accelerator()
    if accelerator is None or len(states) != accelerator.device_count():
        return
    if hasattr(accelerator, "set_rng_state_all"):
        accelerator.set_rng_state_all(states)
    else:
        accelerator.set_rng_state(states[0])


def _accelerator() -> Any:
    """Return the module of the available accelerator, such as ``torch.cuda`` or ``torch.mps``; None without one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None else torch.get_device_module(device)


@contextmanager
def separate_random_state(seed: int) -> Iterator[None]:
    """Draw from generators with this seed during the context, and restore the previous state on exit."""
    state = get_random_state()
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    try:
        yield
    finally:
        set_random_state(state)


def restore_random_state(states: Sequence[dict[str, Any]], rank: int, world: int) -> None:
    """Restore the random state of a rank.

    Without states, or if they are those of another number of ranks, each rank gets a different seed, because ranks must
    sample different responses.

    Args:
        states: The state of each rank in a checkpoint, see ``get_random_state``.
        rank: This rank.
        world: Number of ranks.
    """
    if len(states) == world:
        set_random_state(states[rank])
        return
    if states:
        set_random_state(states[0])
    if rank:
        torch.manual_seed(int(torch.randint(2**31, ())) + rank)
