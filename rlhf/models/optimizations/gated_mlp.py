"""Gated MLPs whose backward pass recomputes what is cheap instead of storing it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from rlhf.models.optimizations.fused_modules import FusedModule
from rlhf.models.optimizations.matrix_products import is_plain, product, weight_gradient
from rlhf.speed import speed_settings

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class _DownProjection(torch.autograd.Function):
    """``down_proj(silu(gate) * up)``, with the gradients that autograd would compute.

    Autograd stores ``silu(gate)`` and the product as well, which are half of the activations of a gated MLP (Shazeer
    2020, section 2, arXiv:2002.05202).
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return product(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        of_weight = None
        if ctx.needs_input_grad[2]:
            of_weight = weight_gradient(gradient, activated * up).to(weight.dtype)
        # Under autocast, the product has another precision.
        of_product = product(gradient, weight.to(gradient.dtype).T)
        of_up = activated.mul_(of_product)
        return torch.ops.aten.silu_backward(of_product.mul_(up), gate), of_up, of_weight


class FusedGatedMLP(FusedModule):
    """A gated MLP, such as that of the Llama family, that stores half of the activations.

    MLPs stay as they are if their activation is not SiLU or is limited, or if they have dropout or a bias in the last
    layer.
    """

    @staticmethod
    def input_width(module: Any) -> int | None:
        if {name for name, _ in module.named_children()} != _PARTS or not is_plain(module.down_proj):
            return None
        return len(module.down_proj.weight) if is_silu(module.act_fn) else None

    def can_fuse_now(self, hidden: Tensor) -> bool:
        down: Any = self.down_proj
        # Layers with an adapter or a hook are called as modules.
        return is_plain(down) and down.bias is None and not has_hooks(down) and speed_settings().fused_mlp

    def fused_forward(self, hidden: Tensor) -> Tensor:
        mlp: Any = self
        output: Tensor = _DownProjection.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden), mlp.down_proj.weight)  # type: ignore[no-untyped-call]
        return output


def is_silu(activation: nn.Module) -> bool:
    """Return whether a module computes SiLU."""
    return isinstance(activation, nn.SiLU | SiLUActivation)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks that run before or after its forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
