"""Gated MLPs whose backward pass computes what is cheap again, instead of storing it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from rlhf.models.probes import FAILURES, are_close, probing
from rlhf.speed import speed_settings

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_fused_classes: dict[type[nn.Module], type[nn.Module]] = {}


class _DownProjection(torch.autograd.Function):
    """``down_proj(silu(gate) * up)``, with the gradients that autograd would compute.

    Autograd stores ``silu(gate)`` and the product as well, which are half of the activations of a gated MLP (Shazeer
    2020, section 2, arXiv:2002.05202).
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        of_weight = None
        if ctx.needs_input_grad[2]:
            of_weight = (gradient.flatten(0, -2).T @ (activated * up).flatten(0, -2)).to(weight.dtype)
        of_product = gradient @ weight.to(gradient.dtype)  # Under autocast, the product has another precision.
        of_up = activated.mul_(of_product)
        return torch.ops.aten.silu_backward(of_product.mul_(up), gate), of_up, of_weight


class FusedGatedMLP(nn.Module):
    """Base class of the gated MLPs that ``fuse_gated_mlps`` has changed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (type(self).__bases__[1],), self.__dict__

    def forward(self, hidden: Tensor) -> Tensor:
        down: Any = self.down_proj
        # Layers with an adapter or a hook are called as modules.
        is_plain = type(down) is nn.Linear and down.bias is None
        if not is_plain or down._forward_hooks or down._forward_pre_hooks or not speed_settings().fused_mlp:
            output: Tensor = super().forward(hidden)
            return output
        return self.fused_forward(hidden)

    def fused_forward(self, hidden: Tensor) -> Tensor:
        mlp: Any = self
        output: Tensor = _DownProjection.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden), mlp.down_proj.weight)  # type: ignore[no-untyped-call]
        return output


def fuse_gated_mlps(trunk: nn.Module) -> None:
    """Let the gated MLPs of a model, such as those of the Llama family, use less memory.

    MLPs with another activation than SiLU, with dropout or with a bias after the product stay as they are. One MLP of
    each class is compared with itself on two tokens.

    Args:
        trunk: A causal model without its output layer.
    """
    verified: dict[type[nn.Module], bool] = {}
    for mlp in trunk.modules():
        kind = type(mlp)
        if not _is_gated(mlp) or issubclass(kind, FusedGatedMLP):
            continue
        if kind not in verified:
            verified[kind] = _computes_the_same(mlp)
        if verified[kind]:
            mlp.__class__ = _fused_class(kind)  # A method of the instance would keep it alive by a reference cycle.


def _fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _fused_classes:
        _fused_classes[kind] = type(kind.__name__, (FusedGatedMLP, kind), {})
    return _fused_classes[kind]


def _new(kind: type[nn.Module]) -> nn.Module:
    """Return a fused MLP without attributes, which pickle sets."""
    fused = _fused_class(kind)
    return fused.__new__(fused)


def _is_gated(mlp: Any) -> bool:
    if {name for name, _ in mlp.named_children()} != _PARTS:
        return False
    return isinstance(mlp.act_fn, nn.SiLU | SiLUActivation) and type(mlp.down_proj) is nn.Linear


def _computes_the_same(mlp: Any) -> bool:
    weight = mlp.down_proj.weight
    try:
        with probing(mlp):
            # Random numbers would change those of the stage.
            hidden = torch.linspace(-1, 1, 2 * len(weight), device=weight.device, dtype=weight.dtype).view(1, 2, -1)
            return are_close(FusedGatedMLP.fused_forward(mlp, hidden), mlp(hidden))
    except FAILURES:
        return False
