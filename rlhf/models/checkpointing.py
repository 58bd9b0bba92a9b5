"""Gradient checkpointing: activations are recomputed in the backward pass."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from rlhf.errors import ConfigError


def enable_gradient_checkpointing(modules: Iterable[nn.Module]) -> None:
    """Recompute the activations of each layer of all transformers models in these modules.

    The models are put into train mode, because transformers stores all activations in eval mode.

    Args:
        modules: Policies, reward models and critics, or modules that contain them.

    Raises:
        ConfigError: An architecture does not support it.

    Reference: Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv:1604.06174).
    """
    for module in modules:
        for model in _outermost_models(module):
            # transformers 5.23 has renamed the method.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            try:
                enable({"use_reentrant": False})
            except ValueError as error:
                raise ConfigError(
                    f"stage.gradient_checkpointing must be false for the architecture {type(model).__name__}, which "
                    "does not support it, got true.",
                    "Set stage.gradient_checkpointing=false.",
                ) from error
            model.train()


def recomputes_layers(module: nn.Module) -> bool:
    """Return whether the backward pass recomputes a layer of a module."""
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


def _outermost_models(module: nn.Module) -> list[PreTrainedModel]:
    """Return the transformers models in a module that are not part of another one."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in _outermost_models(child)]
