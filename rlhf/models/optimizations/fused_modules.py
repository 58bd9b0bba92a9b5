"""Modules of transformers that are replaced by ones whose backward pass needs less memory."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.probes import FAILURES, are_close, probing

_LARGE = 1000  # factor of the states that reach the limit of an activation

_classes: dict[tuple[type["FusedModule"], type[nn.Module]], type["FusedModule"]] = {}


class FusedModule(nn.Module):
    """Base class of modules that ``fuse_modules`` has changed.

    A changed module has a class that inherits from a subclass of this one and from its former class.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        fused, former = type(self).__bases__
        return _new, (fused, former), self.__dict__

    def forward(self, hidden: Tensor) -> Tensor:
        if self.can_fuse_now(hidden):
            return self.fused_forward(hidden)
        output: Tensor = super().forward(hidden)
        return output

    @staticmethod
    @abstractmethod
    def input_width(module: Any) -> int | None:
        """Return the width of the hidden states that a module reads; None if it must stay as it is."""

    @abstractmethod
    def can_fuse_now(self, hidden: Tensor) -> bool:
        """Return whether ``fused_forward`` applies to the module and the switches as they are now."""

    @abstractmethod
    def fused_forward(self, hidden: Tensor) -> Tensor:
        """Compute what the former class computes from [.., width] hidden states."""


def fuse_modules(trunk: nn.Module, fused: type[FusedModule]) -> None:
    """Replace the modules of a model that compute what a fused class computes.

    The first module of each class with the same settings is compared with its fused form on small and large states.

    Args:
        trunk: A causal model without its output layer.
        fused: The fused class.
    """
    verified: dict[tuple[type[nn.Module], str], bool] = {}
    for module in trunk.modules():
        kind = type(module)
        width = fused.input_width(module)
        if width is None or issubclass(kind, FusedModule):
            continue
        key = kind, _settings(module)
        if key not in verified:
            verified[key] = _computes_the_same(module, fused, width)
        if verified[key]:
            module.__class__ = _fused_class(fused, kind)  # A method of the instance would be a reference cycle.


def _settings(module: nn.Module) -> str:
    """Return the numbers and names among the attributes of a module, such as the limit of an activation."""
    return repr([(name, value) for name, value in vars(module).items() if isinstance(value, int | float | str)])


def _fused_class(fused: type[FusedModule], kind: type[nn.Module]) -> type[FusedModule]:
    if (fused, kind) not in _classes:
        _classes[fused, kind] = type(kind.__name__, (fused, kind), {})
    return _classes[fused, kind]


def _new(fused: type[FusedModule], kind: type[nn.Module]) -> nn.Module:
    """Return a fused module without attributes, which pickle sets."""
    result = _fused_class(fused, kind)
    return result.__new__(result)


def _computes_the_same(module: Any, fused: type[FusedModule], width: int) -> bool:
    parameter = next(module.parameters())
    try:
        with probing(module):
            # Random numbers would change those of the stage.
            hidden = torch.linspace(-1, 1, 2 * width, device=parameter.device, dtype=parameter.dtype).view(1, 2, -1)
            # Some MLPs limit large activations.
            return all(are_close(fused.fused_forward(module, x), module(x)) for x in (hidden, _LARGE * hidden))
    except FAILURES:
        return False
