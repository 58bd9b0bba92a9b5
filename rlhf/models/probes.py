"""What short forward passes that find out what a model can do have in common."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# What models raise that cannot do what they are asked to.
FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def are_close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding errors of their precision."""
    is_float32 = found.dtype == torch.float32 and not torch.is_autocast_enabled(found.device.type)
    tolerance = 1e-4 if is_float32 else 0.02
    return bool((found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())


def once_per_model(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Remember the result of a check for each model."""
    results: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    @wraps(check)
    def remembered(model: Any) -> bool:
        if model not in results:
            results[model] = check(model)
        return results[model]

    return remembered


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, without gradients, in this context."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
