"""Matrix products in float32 with oneDNN, for processors on which MKL does not use all units.

PyTorch computes them with MKL. On processors of AMD, MKL uses registers of 256 bits. oneDNN uses 512 bits there, which
doubles the rate if the units are as wide: those of Zen 5 are.
"""

import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from rlhf.models.optimizations.fused_modules import FusedModule
from rlhf.speed import speed_settings

MIN_MULTIPLICATIONS = 2**20  # of a product, below which a call of oneDNN takes longer than it saves
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # of oneDNN and of PyTorch
KEPT_SHAPES = 8  # in each of these caches. A layer needs about as many; the next one computes with the same kernels.


def limit_kernel_caches() -> None:
    """Let oneDNN keep the kernels of few shapes, if it has not computed anything in this process.

    It compiles kernels for each number of tokens, in bfloat16 as well. By default, it keeps those of 1,024 shapes and
    PyTorch as many, which are gigabytes. A kernel of 0.25 MiB also divides the free memory of the heap in which the
    activations of the next step are allocated.

    Variables of the environment that are set already stay as they are.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KEPT_SHAPES))


@cache
def gains_from_onednn() -> bool:
    """Return whether products with oneDNN are faster on this processor: AMD, since Zen 5."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    capabilities = torch.cpu.get_capabilities()
    # The processors of AMD that have both kinds of instructions are Zen 5 and later.
    is_wide = capabilities.get("avx512_f") and capabilities.get("avx_vnni")
    return bool(is_wide) and "AMD" in str(capabilities.get("cpu_name"))


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether ``linear`` and ``product`` use oneDNN for these tensors."""
    enabled = speed_settings().onednn_products
    return (
        (gains_from_onednn() if enabled is None else enabled and torch.backends.mkldnn.is_available())
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and weight.is_cpu
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() * len(weight) >= MIN_MULTIPLICATIONS
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``F.linear``: [.., K] inputs and [N, K] weights to [.., N]."""
    if not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _onednn(x, weight, bias)
    output: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return output


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x @ weight.T`` without a gradient: [.., K] and [N, K] to [.., N]."""
    return _onednn(x, weight) if uses_onednn(x, weight) else F.linear(x, weight)


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Compute the gradient of the weight in ``linear``: [.., N] gradients of outputs and [.., K] inputs to [N, K]."""
    gradient, x = gradient.flatten(0, -2).T, x.flatten(0, -2).T
    # The call copies its first argument, which is not contiguous. The narrower one is up to three times as fast.
    return product(x, gradient).T if len(x) < len(gradient) else product(gradient, x)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # The operation that torch.compile uses. It has no public name.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    """``F.linear`` and its gradients by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(gradient, weight.T) if of_x else None,
            weight_gradient(gradient, x) if of_weight else None,
            gradient.flatten(0, -2).sum(dim=0) if of_bias else None,
        )


class FusedLinear(FusedModule):
    """A linear layer whose products are computed by ``linear``."""

    @staticmethod
    def input_width(module: Any) -> int | None:
        if type(module) is nn.Linear:
            return int(module.in_features)
        return int(module.nx) if type(module) is Conv1D else None

    def can_fuse_now(self, hidden: Tensor) -> bool:
        return uses_onednn(hidden, self._matrix())

    def fused_forward(self, hidden: Tensor) -> Tensor:
        layer: Any = self
        return linear(hidden, FusedLinear._matrix(layer), layer.bias)

    def _matrix(self) -> Tensor:
        """Return the [N, K] weight."""
        layer: Any = self
        weight: Tensor = layer.weight
        return weight.T if isinstance(self, Conv1D) else weight


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Return whether a module is a linear layer of a class, fused or not, and no layer with an adapter or the like."""
    return type(module) is kind or (isinstance(module, FusedLinear) and isinstance(module, kind))
