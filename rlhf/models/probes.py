"""What short forward passes that find out what a model can do have in common."""

import torch
from torch import Tensor

# What models raise that cannot do what they are asked to.
FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def are_close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding errors of their precision."""
    is_float32 = found.dtype == torch.float32 and not torch.is_autocast_enabled(found.device.type)
    tolerance = 1e-4 if is_float32 else 0.02
    return bool((found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())
