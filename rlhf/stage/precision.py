"""The precision of the Trainer."""

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision


def autocast_dtype(plugin: Precision) -> torch.dtype | None:
    """Return the dtype that autocast computes in, or None if the Trainer does not use autocast."""
    if not isinstance(plugin, MixedPrecision):
        return None
    return torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.float16
