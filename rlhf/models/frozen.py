"""Frozen models, and models without dropout."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Frozen(nn.Module):
    """A model that is used but not trained, such as a reference or reward model.

    It moves to the device and dtype of the module that contains it. Apart from that, the outer module does not see it:
    it stays in eval mode, the optimizer finds no parameters in it, and checkpoints do not contain it.

    Args:
        model: The model. It is put into eval mode, and its parameters no longer require gradients.
    """

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Bypass the registry of nn.Module, so that parameters(), state_dict() and train() do not reach the model.
        object.__setattr__(self, "model", model.eval().requires_grad_(False))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Frozen":
        self.model._apply(fn, recurse)
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def disable_dropout(model: M) -> M:
    """Set every dropout probability to 0, so that train and eval mode give the same results.

    With dropout, the ratio of PPO would differ from 1 before the first update.

    Reference: Huang et al. 2024, detail 18 (arXiv:2403.17031).
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for settings in (module, getattr(module, "config", None)):  # some layers read the config in every forward pass
            for name, value in list(vars(settings).items()) if settings is not None else ():
                if ("dropout" in name or "layerdrop" in name) and isinstance(value, float):
                    setattr(settings, name, 0.0)
    return model
