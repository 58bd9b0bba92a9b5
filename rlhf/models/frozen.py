"""Frozen models, and models without noise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf.models.scalar import ScalarHead

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


def all_named_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in a module with their names, as ``named_modules`` does, and those that ``Frozen`` hides."""
    for name, part in module.named_modules(prefix=prefix):
        yield name, part
        if isinstance(part, Frozen):
            yield from all_named_modules(part.model, f"{name}.model".lstrip("."))


def cast_frozen_matrices(module: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of frozen linear layers in the dtype of autocast.

    Autocast converts these weights whenever a layer uses them, because it caches the copies of trainable weights only.
    Storing the converted weights changes no result and takes less memory. All other weights stay as they are: those
    that are trained, embeddings and output embeddings tied to them, norms, and scalar heads, which compute in float32.

    Args:
        module: A module, and all ``Frozen`` modules in it.
        dtype: The dtype that autocast computes in.
    """
    parts = [part for _, part in all_named_modules(module)]
    embeddings = {id(part.weight) for part in parts if isinstance(part, nn.Embedding)}
    in_heads = {id(layer) for part in parts if isinstance(part, ScalarHead) for layer in part.modules()}
    for part in parts:
        if isinstance(part, nn.Linear | Conv1D) and id(part) not in in_heads:
            parameters = list(part.parameters(recurse=False))
            if not any(parameter.requires_grad or id(parameter) in embeddings for parameter in parameters):
                for parameter in parameters:
                    if parameter.dtype == torch.float32:
                        # The parameter itself changes, so that models that share it keep sharing it.
                        parameter.data = parameter.data.to(dtype)


@contextmanager
def frozen_in_float32(module: nn.Module) -> Iterator[None]:
    """Compute with float32 copies of the weights that ``cast_frozen_matrices`` has cast, inside of this context.

    The values stay rounded. Without autocast, layers cannot mix dtypes.

    Args:
        module: A module with ``Frozen`` modules in it.
    """
    frozen = [part.model for part in module.modules() if isinstance(part, Frozen)]
    half = (torch.bfloat16, torch.float16)
    parameters = {p: p.dtype for model in frozen for p in model.parameters() if p.dtype in half}
    for parameter in parameters:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in parameters.items():
            parameter.data = parameter.data.to(dtype)


def disable_dropout(model: M) -> M:
    """Disable dropout and the noise of routers, so that train and eval mode give the same results.

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
        # Routers of mixtures of experts add noise in train mode only. In eval mode, the same number may be a threshold.
        if any("jitter" in name for name in vars(module)):
            module.register_forward_pre_hook(_enter_eval_mode)
    return model


def _enter_eval_mode(module: nn.Module, arguments: Any) -> None:
    """Put a module, without the modules in it, into eval mode: a hook that runs before its forward pass."""
    module.training = False
