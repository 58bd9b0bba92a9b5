"""Gradient checkpointing: activations are recomputed in the backward pass."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel


def enable_gradient_checkpointing(modules: Iterable[nn.Module]) -> None:
    """Recompute the activations of each layer of all transformers models in these modules.

    Reference: Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv:1604.06174).
    """
    for module in modules:
        for part in module.modules():
            if isinstance(part, PreTrainedModel):
                part.gradient_checkpointing_enable({"use_reentrant": False})
                break
