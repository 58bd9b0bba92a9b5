"""Matrix products with oneDNN, in blocks of rows.

In float32, PyTorch computes them with MKL. On processors of AMD, MKL uses registers of 256 bits. oneDNN uses 512 bits
there, which doubles the rate if the units are as wide: those of Zen 5 are.

In bfloat16, PyTorch computes them with oneDNN, which compiles and keeps kernels for each shape. A process that computed
every number of tokens as it comes would need more memory after every batch, up to gigabytes.
"""

from collections.abc import Iterator
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
MAX_RESULT = 2**22  # bytes that a call computes, which stay in the cache until they are copied
MAX_COPIED = 2**24  # bytes that a call copies to another layout


@cache
def gains_from_onednn(dtype: torch.dtype) -> bool:
    """Return whether this processor gains from products with oneDNN in blocks.

    Args:
        dtype: ``torch.float32`` or ``torch.bfloat16``.
    """
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    found = torch.cpu.get_capabilities()
    if dtype == torch.bfloat16:
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    # The processors of AMD that have both kinds of instructions are Zen 5 and later.
    return "AMD" in str(found.get("cpu_name")) and bool(found.get("avx512_f") and found.get("avx_vnni"))


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether ``linear`` and ``product`` compute these tensors in blocks with oneDNN."""
    if not x.is_cpu or type(weight) not in (Tensor, nn.Parameter) or x.numel() * len(weight) < MIN_MULTIPLICATIONS:
        return False
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        if torch.is_autocast_cache_enabled():  # while responses are sampled, so that weights are cast once
            return False
    elif weight.dtype != dtype:
        return False
    if dtype not in (torch.float32, torch.bfloat16) or not weight.is_cpu:
        return False
    enabled = speed_settings().onednn_products
    return gains_from_onednn(dtype) if enabled is None else enabled and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``F.linear``: [.., K] inputs and [N, K] weights to [.., N]."""
    if not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    x, weight = _cast(x), _cast(weight)
    bias = None if bias is None else _cast(bias)
    if not torch.is_grad_enabled():
        return _in_blocks(x, weight, bias)
    output: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return output


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x @ weight.T`` without a gradient: [.., K] and [N, K] to [.., N]."""
    return _in_blocks(_cast(x), _cast(weight)) if uses_onednn(x, weight) else F.linear(x, weight)


def _cast(tensor: Tensor) -> Tensor:
    """Cast a tensor as autocast does."""
    return tensor.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else tensor


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Compute the gradient of the weight in ``linear``: [.., N] gradients of outputs and [.., K] inputs to [N, K]."""
    gradient, x = gradient.flatten(0, -2), x.flatten(0, -2)
    if not uses_onednn(gradient, x.T):
        return gradient.T @ x
    gradient, x = _cast(gradient), _cast(x)
    # The call copies its first argument, which is not contiguous. The narrower one is up to three times as fast.
    narrow, wide = sorted((gradient, x), key=lambda matrix: matrix.shape[1])
    result = torch.zeros(narrow.shape[1], wide.shape[1], dtype=torch.float32)
    for rows in blocks(len(x), MAX_COPIED // (wide.element_size() * wide.shape[1])):
        is_small = (rows.stop - rows.start) * result.numel() < MIN_MULTIPLICATIONS
        result += narrow[rows].T @ wide[rows] if is_small else _onednn(narrow[rows].T, wide[rows].T)
    return (result if narrow is gradient else result.T).to(x.dtype)


def _in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``F.linear``, a block of rows at a time."""
    inputs = x.flatten(0, -2)
    parts = list(blocks(len(inputs), MAX_RESULT // (x.element_size() * len(weight))))
    if len(parts) == 1:
        return _onednn(x, weight, bias)
    result = x.new_empty(*x.shape[:-1], len(weight))
    outputs = result.flatten(0, -2)
    for rows in parts:
        part = inputs[rows]
        outputs[rows] = (F.linear if part.numel() * len(weight) < MIN_MULTIPLICATIONS else _onednn)(part, weight, bias)
    return result


def blocks(rows: int, limit: int) -> Iterator[slice]:
    """Divide a number of rows into powers of two, the largest ones first.

    Args:
        rows: Number of rows.
        limit: Number of rows that a block does not exceed, if it is positive.
    """
    start, size = 0, 1 << max(limit, 1).bit_length() - 1
    while start < rows:
        while size > rows - start:
            size //= 2
        yield slice(start, start + size)
        start += size


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # The operation that torch.compile uses. It has no public name.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    """``F.linear`` and its gradients by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _in_blocks(x, weight, bias)

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
