"""RMS norms whose backward pass recomputes the normalized states instead of storing them."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.models.optimizations.fused_modules import FusedModule
from rlhf.speed import speed_settings

MIN_WIDTH = 512  # of the states, below which little memory is saved and a step takes up to 4 % longer


class _RMSNorm(torch.autograd.Function):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

    With ``s = 1 / sqrt(mean(x^2) + eps)`` and the gradient g of the output, the gradient of x is
    ``s * weight * g - s^3 * x * mean(weight * g * x)``.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        states = hidden.flatten(0, -2)
        mean = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_().div_(len(weight))
        scale = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        normed: Tensor = (states * scale).mul_(weight).view_as(hidden)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight, scale = ctx.saved_tensors
        states, gradient = hidden.flatten(0, -2), gradient.flatten(0, -2)
        of_weight = (gradient * states).mul_(scale).sum(dim=0) if ctx.needs_input_grad[1] else None
        weighted = gradient * weight
        correction = (weighted * states).mean(dim=-1, keepdim=True).mul_(scale.pow(3))
        of_states = weighted.mul_(scale).addcmul_(states, correction, value=-1)
        return of_states.view_as(hidden), of_weight, None


class FusedRMSNorm(FusedModule):
    """An RMS norm of wide states in float32 that stores its input only."""

    @staticmethod
    def input_width(module: Any) -> int | None:
        names = [name for name, _ in module.named_parameters()]
        if names != ["weight"] or not hasattr(module, "variance_epsilon"):
            return None
        # The norms of Mamba-2 within a layer have a second argument, the gate.
        takes_one = len(inspect.signature(module.forward).parameters) == 1
        return len(module.weight) if takes_one and len(module.weight) >= MIN_WIDTH else None

    def can_fuse_now(self, hidden: Tensor) -> bool:
        norm: Any = self
        return hidden.dtype == norm.weight.dtype == torch.float32 and speed_settings().fused_rms_norm

    def fused_forward(self, hidden: Tensor) -> Tensor:
        norm: Any = self
        output: Tensor = _RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
        return output
