"""Attention of short rows that are packed in a single row, in one padded batch.

With few tokens in a row, PyTorch's SDPA on a CPU spends most of its time outside the matrix products. One batched
product is faster, even though it includes padding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.models.optimizations.layouts import Layout

MAX_TOKENS = 128  # of a row, above which SDPA is as fast
MAX_PADDING = 1.5  # pairs of tokens of the padded batch, relative to those of the rows


@dataclass(frozen=True)
class PaddedRows:
    """Where the tokens of packed rows are in a padded batch.

    Args:
        rows: Number of rows.
        width: Number of tokens of the longest row.
        indices: [tokens] the index of each token in the padded batch of ``rows * width`` tokens.
        bias: [1 or rows, width, width] 0 where a token sees another one, otherwise minus infinity.
    """

    rows: int
    width: int
    indices: Tensor
    bias: Tensor

    @classmethod
    def of(cls, layout: Layout, indices: Tensor) -> "PaddedRows | None":
        """Return the padded batch of a layout; None if SDPA is faster row by row.

        Args:
            layout: The rows.
            indices: See above.
        """
        lengths = layout.lengths
        rows, width = len(lengths), max(lengths)
        pairs = sum(length**2 for length in lengths)
        if not indices.is_cpu or width > MAX_TOKENS or rows * width**2 > MAX_PADDING * pairs:
            return None
        visible = layout.visible(torch.arange(rows), width, indices.device)
        bias = torch.zeros(visible.shape, dtype=torch.float32)  # the default dtype may be that of bf16-true
        return cls(rows, width, indices, bias.masked_fill(~visible, -torch.inf))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Compute attention within each row.

        Args:
            query: [1, heads, tokens, width of a head] queries of the packed rows.
            key: [1, heads of keys, tokens, width of a head] keys; several heads of queries may share one.
            value: [1, heads of keys, tokens, width of a value] values.
            scale: Factor of the products of queries and keys. None: ``head_width ** -0.5``.

        Returns:
            [1, tokens, heads, width of a value].
        """
        heads, tokens, head_width = query.shape[1:]
        value_width = value.shape[-1]
        shared = heads // key.shape[1]
        keys, values = (self._padded(x).flatten(0, 1) for x in (key, value))
        queries = self._padded(query).reshape(len(keys), -1, head_width)
        bias = self.bias.repeat(1, shared, 1)
        if len(bias) > 1:
            bias = bias.repeat_interleave(key.shape[1], dim=0)
        scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=head_width**-0.5 if scale is None else scale)
        attended = torch.bmm(scores.softmax(dim=-1), values).view(self.rows, heads, self.width, value_width)
        unpadded: Tensor = _Unpad.apply(attended.transpose(1, 2).flatten(0, 1).flatten(1), self.indices)  # type: ignore[no-untyped-call]
        return unpadded.view(1, tokens, heads, value_width)

    def _padded(self, packed: Tensor) -> Tensor:
        """Move [1, heads, tokens, width of a head] to [rows, heads, width, width of a head]. Padding is 0."""
        heads, _, head_width = packed.shape[1:]
        padded: Tensor = _Pad.apply(packed[0].transpose(0, 1).flatten(1), self.indices, self.rows * self.width)  # type: ignore[no-untyped-call]
        return padded.view(self.rows, self.width, heads, head_width).transpose(1, 2)


class _Pad(torch.autograd.Function):
    """[tokens, width] to [rows * width, width]. Autograd would add the gradients one by one."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, indices: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(indices)
        return packed.new_zeros(count, packed.shape[1]).index_copy_(0, indices, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return gradient.index_select(0, indices), None, None


class _Unpad(torch.autograd.Function):
    """[rows * width, width] to [tokens, width]."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.count = len(padded)
        return padded.index_select(0, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.count, gradient.shape[1]).index_copy_(0, indices, gradient), None
