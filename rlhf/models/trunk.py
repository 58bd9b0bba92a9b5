"""Last hidden states of tokens: which rows of a batch are computed together, and where the state of a token is."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlhf.models.optimizations.fused_modules import fuse_modules
from rlhf.models.optimizations.gated_mlp import FusedGatedMLP
from rlhf.models.optimizations.last_layer import allows_partial_last_layer, partial_last_layer, saves_last_layer
from rlhf.models.optimizations.layouts import Layout, SeparateRows
from rlhf.models.optimizations.matrix_products import FusedLinear, limit_kernel_caches
from rlhf.models.optimizations.packed_rows import allows_packed_rows, can_pack_rows, packed_hidden_states
from rlhf.models.optimizations.rms_norm import FusedRMSNorm
from rlhf.models.optimizations.shared_prompts import shared_prompts
from rlhf.models.probes import length_boundary
from rlhf.speed import SpeedSettings, speed_settings
from rlhf.tensors import upload

# On an accelerator, rows of up to this many tokens use one masked attention call instead of two per row.
MASKED_TOKENS = 256
GROUP_TOKENS = 64  # tokens whose computation takes about as long as the overhead of another forward pass
# Ranks must make the same calls of a sharded model, so these settings do not depend on the rows of a rank.
SHARDED_SETTINGS = SpeedSettings(packed_rows=False, row_groups=1, shared_prompts=False, partial_last_layer=False)


def prepare_trunk(trunk: Any) -> None:
    """Find out which optimizations a model allows, and keep the model from looking for padding tokens.

    Some models, such as GPT-2, look for them when they are called without an attention mask. The host would wait for
    the device, and the warning would be wrong: ``hidden_states`` needs no attention mask.

    Modules that text does not pass, such as image encoders, are frozen: they get no gradient, which DDP rejects.

    Args:
        trunk: A causal model without its output layer.
    """
    for module in encoders(trunk):
        module.requires_grad_(False)
    if hasattr(trunk, "warn_if_padding_and_no_attention_mask"):
        trunk.warn_if_padding_and_no_attention_mask = _ignore
    limit_kernel_caches()
    fuse_modules(trunk, FusedLinear)
    fuse_modules(trunk, FusedGatedMLP)
    fuse_modules(trunk, FusedRMSNorm)
    allows_partial_last_layer(trunk)
    allows_packed_rows(trunk)


def encoders(trunk: nn.Module) -> list[nn.Module]:
    """Return the modules of a multimodal model that text does not pass, such as encoders of images.

    Args:
        trunk: A causal model without its output layer.
    """
    decoder = getattr(trunk, "language_model", None)  # the name that multimodal models share
    return [] if decoder is None else [module for module in trunk.children() if module is not decoder]


def _ignore(*args: Any) -> None:
    """Do nothing."""


def hidden_states(
    trunk: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: tuple[Tensor, Tensor],
    *,
    lengths: Sequence[int] | None = None,
    shared_tokens: Sequence[int] = (),
) -> Tensor:
    """Last hidden states of some tokens, independent of padding, batch size and the other rows of the batch.

    The trunk only sees right-padded rows, where causality alone keeps padding away from real tokens. It therefore needs
    no attention mask, which attention and state-space models interpret differently, and positions are counted from the
    first real token.

    Args:
        trunk: A causal model without its output layer.
        input_ids: [batch, time] token ids.
        attention_mask: [batch, time] bool, True on real tokens. They must be contiguous; padding may be on either side.
        positions: Rows and columns of the tokens, [tokens] each.
        lengths: Number of real tokens of each row, if all padding is on the right. None: unknown.
        shared_tokens: Number of leading tokens that each row of the first half has in common with the same row of the
            second half, for each row of the batch. They are computed once where ``SharedPrompts`` applies. Empty:
            nothing is known to be in common.

    Returns:
        [tokens, width] states, in the order of ``positions``.
    """
    if lengths is None and attention_mask.is_cpu and bool(attention_mask[:, 0].all()):
        lengths = attention_mask.sum(dim=1).tolist()
    is_sharded = any(isinstance(part, FSDPModule) for part in trunk.modules())
    settings = SHARDED_SETTINGS if is_sharded else speed_settings()
    partial = settings.partial_last_layer
    max_groups = settings.row_groups if input_ids.is_cpu else 1
    boundary = length_boundary(trunk)
    if lengths is None:
        input_ids, positions = _right_padded(input_ids, attention_mask, positions)
        if boundary is None:
            return _padded(trunk, input_ids, positions, partial)
        # Rows that are padded to more tokens than the longest one has could be above the boundary.
        lengths = attention_mask.sum(dim=1).tolist()
    if boundary is not None and not is_sharded and min(lengths) <= boundary < max(lengths):
        groups = split_by_length(lengths, max(max_groups, 2), boundary)
        return _grouped(trunk, input_ids, SeparateRows.of(lengths), groups, positions, partial)
    pairs = shared_prompts(trunk, lengths, shared_tokens) if settings.shared_prompts and shared_tokens else None
    layout: Layout = pairs or SeparateRows.of(lengths)
    if settings.packed_rows and _gains_from_packing(layout, is_cpu=input_ids.is_cpu) and can_pack_rows(trunk):
        starts = torch.tensor([0, *layout.lengths[:-1]]).cumsum(0)
        used = _token_indices(layout, starts, input_ids)[positions]
        with _computing_used(trunk, used, sum(layout.lengths), partial):
            states = packed_hidden_states(trunk, input_ids, layout)
        return states.index_select(0, used)
    return _grouped(trunk, input_ids, layout, split_by_length(layout.lengths, max_groups), positions, partial)


def _gains_from_packing(layout: Layout, *, is_cpu: bool) -> bool:
    """Return whether packing saves padding or, for pairs, products of attention that a mask would remove."""
    lengths = layout.lengths
    if not is_cpu:
        return layout.needs_mask and max(lengths) > MASKED_TOKENS
    return layout.needs_mask or min(lengths) < max(lengths)


def _grouped(
    trunk: nn.Module,
    input_ids: Tensor,
    layout: Layout,
    groups: Sequence[tuple[Tensor, int]],
    positions: tuple[Tensor, Tensor],
    partial: bool,
) -> Tensor:
    """Compute ``hidden_states`` of groups of padded rows, as ``split_by_length`` returns them."""
    ends = list(accumulate(len(rows) * width for rows, width in groups))
    starts = torch.empty(len(layout.lengths), dtype=torch.long)
    for end, (rows, width) in zip(ends, groups, strict=True):
        starts[rows] = end - width * torch.arange(len(rows), 0, -1)
    used = _token_indices(layout, starts, input_ids)[positions]
    states = []
    for end, (rows, width) in zip(ends, groups, strict=True):
        start = end - len(rows) * width
        of_group = used if len(groups) == 1 else used[(used >= start) & (used < end)] - start
        with _computing_used(trunk, of_group, end - start, partial):
            states.append(layout.padded_hidden_states(trunk, input_ids, rows, width).flatten(0, 1))
    return (torch.cat(states) if len(states) > 1 else states[0]).index_select(0, used)


def _token_indices(layout: Layout, starts: Tensor, input_ids: Tensor) -> Tensor:
    """Return the index of each token of the batch among the computed tokens, given where rows start: [batch, time]."""
    return upload(starts[layout.rows, None] + layout.columns(input_ids.shape[1]), input_ids.device)


def states_before(
    trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: tuple[Tensor, Tensor], **layout: Any
) -> Tensor:
    """States from which tokens are predicted (the next-token shift): [tokens, width], in the order of the tokens.

    A causal model predicts token t from the state at position t - 1. Every shift in this project is made here.

    Args:
        trunk: See ``hidden_states``, as for the other arguments.
        input_ids: [batch, time] token ids.
        attention_mask: [batch, time] bool, True on real tokens.
        positions: Rows and columns of the tokens to predict, as ``true_positions`` gives them. They must not be in
            column 0, because nothing precedes the first token.
        layout: ``lengths`` and ``shared_tokens``.
    """
    rows, columns = positions
    return hidden_states(trunk, input_ids, attention_mask, (rows, columns - 1), **layout)


def _right_padded(
    input_ids: Tensor, attention_mask: Tensor, positions: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Move all padding to the right, wherever it is, without reading anything on the host."""
    rows, columns = positions
    time = torch.arange(input_ids.shape[1], device=input_ids.device)
    start = attention_mask.to(torch.int8).argmax(dim=1)
    return input_ids.gather(1, (time + start[:, None]) % len(time)), (rows, (columns - start[rows]) % len(time))


def _padded(trunk: nn.Module, input_ids: Tensor, positions: tuple[Tensor, Tensor], partial: bool) -> Tensor:
    """Compute ``hidden_states`` of rows that are padded on the right, of unknown lengths."""
    rows, columns = positions
    used = rows * input_ids.shape[1] + columns
    with _computing_used(trunk, used, input_ids.numel(), partial):
        states: Tensor = trunk(input_ids=input_ids, use_cache=False).last_hidden_state
    return states.flatten(0, 1).index_select(0, used)


def _computing_used(trunk: nn.Module, used: Tensor, computed: int, partial: bool) -> AbstractContextManager[None]:
    """Let the last layer compute some tokens only, if this saves time."""
    if partial and saves_last_layer(trunk, len(used), computed):
        return partial_last_layer(trunk, used)
    return nullcontext()


def split_by_length(lengths: Sequence[int], max_groups: int, boundary: int | None = None) -> list[tuple[Tensor, int]]:
    """Split rows into groups of similar length such that few padding tokens are computed.

    Args:
        lengths: Number of tokens of each row.
        max_groups: Largest number of groups.
        boundary: Rows of up to this length are in different groups from longer rows, which needs two groups. None: rows
            of any length may be in one group.

    Returns:
        The row indices of each group, and the length of its longest row.
    """
    count = len(lengths)
    if max_groups == 1 or count == 1:
        return [(torch.arange(count), max(lengths))]
    ordered, order = torch.tensor(lengths).sort(stable=True)
    # cost[i, j]: tokens of a group of the rows from i to j - 1, and the overhead of a group.
    ends = torch.arange(count + 1)
    cost = (ends - ends[:, None]) * torch.cat([ordered[:1], ordered]) + GROUP_TOKENS
    is_group = ends > ends[:, None]
    if boundary is not None:
        is_long = ordered > boundary
        is_group &= torch.cat([is_long, is_long[-1:]])[:, None] == torch.cat([is_long[:1], is_long])
    cost = torch.where(is_group, cost, torch.iinfo(torch.long).max // 2)
    best, starts = cost[0], []
    for _ in range(max_groups - 1):  # ``best`` is the lowest cost of the rows before j with at most so many groups.
        extended, start = (best[:, None] + cost).min(dim=0)
        start = torch.where(extended < best, start, -1)
        best = torch.minimum(best, extended)
        starts.append(start)
    end, groups = count, []
    for start in reversed(starts):
        if (cut := int(start[end])) >= 0:
            groups.append((order[cut:end], int(ordered[end - 1])))
            end = cut
    return [(order[:end], int(ordered[end - 1])), *reversed(groups)]
