"""Arithmetic that stays in float32 under mixed precision."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtype of the inputs on this device, in this context.

    Autocast would compute some reductions of float32 tensors in lower precision, such as ``torch.linalg.vecdot``.
    """
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if autocast else nullcontext()
