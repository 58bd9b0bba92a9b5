"""Models that must not change: moved with their owner, and nothing else."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Frozen(nn.Module):
    """A reference or reward model inside a LightningModule.

    It goes to the owner's device and precision, but stays in eval mode without gradient whatever the Trainer does to
    its owner, has no parameters an optimizer could find, and is not stored again in checkpoints.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # outside nn.Module's registry: parameters(), state_dict() and train() of the owner do not see it
        object.__setattr__(self, "model", model.eval().requires_grad_(False))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Frozen":
        self.model._apply(fn, recurse)
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def disable_dropout(model: M) -> M:
    """Set every dropout of a model to 0, so that its train and eval modes give the same numbers.

    Source: Huang et al. 2024, detail 18 (arXiv:2403.17031): with dropout the ratio of PPO means nothing.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for settings in (module, getattr(module, "config", None)):  # some layers read the configuration as they run
            for name, value in list(vars(settings).items()) if settings is not None else ():
                if ("dropout" in name or "layerdrop" in name) and isinstance(value, float):
                    setattr(settings, name, 0.0)
    return model
