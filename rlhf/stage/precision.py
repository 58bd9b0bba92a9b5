"""The precision of the Trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from torch import nn

from rlhf.models import cast_frozen_matrices


def autocast_dtype(plugin: Precision) -> torch.dtype | None:
    """Return the dtype that autocast computes in, or None if the Trainer does not use autocast."""
    if not isinstance(plugin, MixedPrecision):
        return None
    return torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.float16


def gradient_scaler(plugin: Precision) -> Any:
    """Return what multiplies the loss in float16, a ``torch.amp.GradScaler``; None in any other precision."""
    return getattr(plugin, "scaler", None)


def keep_batches(plugin: Precision) -> None:
    """Let ``bf16-true`` and ``16-true`` keep the numbers in batches, such as log-probs and ratings, in float32.

    Lightning would round them: above 128 nats, the summed log-prob of a response to integers.
    """
    if isinstance(plugin, HalfPrecision):
        plugin.convert_input = _unchanged  # type: ignore[method-assign]


def _unchanged(data: Any) -> Any:
    return data


@contextmanager
def scoring_context(plugin: Precision) -> Iterator[None]:
    """Enter the Trainer's precision, but let reward functions create tensors in float32.

    Under ``bf16-true``, ``torch.tensor`` would otherwise round the scores of a reward function to 8 significant bits.
    """
    with plugin.forward_context():
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def move_frozen(module: lightning.LightningModule, model: nn.Module) -> Any:
    """Move a model that is not trained to the device, in the Trainer's precision, and return it.

    Args:
        module: The LightningModule that uses the model.
        model: A ``Frozen`` model, or a module that contains one.
    """
    return prepare_frozen(model, module.trainer.precision_plugin, module.device)


def prepare_frozen(model: nn.Module, plugin: Precision, device: torch.device) -> Any:
    """Move a model that is not trained to a device, in the precision of a Trainer, and return it.

    Args:
        model: A ``Frozen`` model, or a module that contains one.
        plugin: The precision plugin of the Trainer.
        device: The device.
    """
    if (dtype := autocast_dtype(plugin)) is not None:
        cast_frozen_matrices(model, dtype)
    return plugin.convert_module(model).to(device)


@contextmanager
def frozen_on_device(module: lightning.LightningModule, model: nn.Module) -> Iterator[Any]:
    """Move a model to the device with ``move_frozen``, and free its memory at the end of the context."""
    try:
        yield move_frozen(module, model)
    finally:
        model.to("meta")  # The sampler may still refer to the model.
