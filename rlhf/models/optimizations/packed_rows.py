"""Rows of a batch one after another in a single row without padding, each of which attends to itself only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf.models.autocast import without_autocast
from rlhf.models.checkpointing import recomputes_layers
from rlhf.models.optimizations.layouts import Layout, SharedPrompts, Sizes
from rlhf.models.optimizations.padded_attention import PaddedRows
from rlhf.models.probes import FAILURES, are_close, has_full_sdpa, once_per_architecture, probing
from rlhf.tensors import upload

# Tokens of a sequence up to which attention in float32 is at least as fast. In bfloat16, the backward pass compiles a
# kernel for each new length.
MAX_FLOAT32_TOKENS = 512
_NAME = "rlhf_packed_rows"
# The sizes of the rows whose hidden states are being computed, and the padded batch in which they attend, if any.
_rows: ContextVar[tuple[Sequence[Sizes], PaddedRows | None]] = ContextVar("rows")
# A pair and a single sequence, which are three sequences of five tokens.
_PROBE: list[Sizes] = [(3, 2, 2), (0, 5, 0)]
_PROBE_POSITIONS = [0, 1, 2, 3, 4, 3, 4, 0, 1, 2, 3, 4]
_PROBE_SEQUENCES = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6], [7, 8, 9, 10, 11]]  # indices of their tokens


def packed_hidden_states(trunk: Any, input_ids: Tensor, layout: Layout) -> Tensor:
    """Compute the last hidden states of all rows in one row: [tokens, width], row by row.

    Args:
        trunk: A model that ``allows_packed_rows``.
        input_ids: [batch, time] token ids, padded on the right.
        layout: The rows of the batch.
    """
    lengths = torch.tensor(layout.lengths)
    width = max(layout.lengths)
    real = upload((torch.arange(width) < lengths[:, None]).flatten().nonzero()[:, 0], input_ids.device)
    tokens, positions = layout.tokens(input_ids, torch.arange(len(lengths)), width)
    padded = PaddedRows.of(layout, real)
    return _packed(trunk, tokens.flatten()[real], positions.flatten()[real], layout.sizes, padded)


def _packed(
    trunk: Any, tokens: Tensor, positions: Tensor, sizes: Sequence[Sizes], padded: PaddedRows | None = None
) -> Tensor:
    """Compute the last hidden states of packed rows: [tokens] token ids and positions to [tokens, width]."""
    with _own_attention(trunk, sizes, padded):
        states: Tensor = trunk(input_ids=tokens[None], position_ids=positions[None], use_cache=False).last_hidden_state
    return states[0]


@contextmanager
def _own_attention(trunk: Any, sizes: Sequence[Sizes], padded: PaddedRows | None) -> Iterator[None]:
    """Let the attention layers of a model call ``_attend`` for these rows."""
    config = trunk.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = _NAME
    token = _rows.set((sizes, padded))
    try:
        yield
    finally:
        config._attn_implementation = before
        _rows.reset(token)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    """Compute attention as transformers calls it.

    Raises:
        ValueError: The model computes a mask by itself, which would have no effect.
    """
    if attention_mask is not None:
        raise ValueError("packed rows have no mask")
    keywords.pop("is_causal", None)
    sizes, padded = _rows.get()
    if padded is not None and not keywords.get("dropout"):
        dtype = value.dtype
        with _in_float32(query, key, value) as (query, key, value):
            return padded.attend(query, key, value, keywords.get("scaling")).to(dtype), None
    lengths = [sum(row) for row in sizes]
    parts = zip(sizes, *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([_attend_row(module, *part, **keywords) for part in parts], dim=1), None


def _attend_row(module: nn.Module, sizes: Sizes, *inputs: Tensor, **keywords: Any) -> Tensor:
    """Compute the attention of one row: [1, heads, time, width] queries, keys and values to [1, time, heads, width]."""
    prompt, first, second = sizes
    dtype = inputs[-1].dtype
    if inputs[0].is_cpu and prompt + max(first, second) <= MAX_FLOAT32_TOKENS:
        with _in_float32(*inputs) as (query, key, value):
            return _attend_sequences(module, sizes, query, key, value, **keywords).to(dtype)
    return _attend_sequences(module, sizes, *inputs, **keywords)


@contextmanager
def _in_float32(*inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cast tensors to float32, and let autocast keep them so in this context."""
    with without_autocast(inputs[0].device):
        yield tuple(x.float() for x in inputs)


def _attend_sequences(
    module: nn.Module, sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, **keywords: Any
) -> Tensor:
    """Compute the attention of the sequences of one row.

    SDPA with a mask would compute all products of queries and keys. Causal attention computes about half of them.
    """
    prompt, first, second = sizes
    (query, next_query), (key, next_key), (value, next_value) = (
        x.split([prompt + first, second], dim=2) for x in (query, key, value)
    )
    attended: Tensor = sdpa_attention_forward(module, query, key, value, None, is_causal=True, **keywords)[0]
    if second == 0:
        return attended
    next_key = torch.cat([key[:, :, :prompt], next_key], dim=2)
    next_value = torch.cat([value[:, :, :prompt], next_value], dim=2)
    visible = torch.ones(1, 1, second, prompt + second, dtype=torch.bool, device=query.device).tril(prompt)
    next_attended, _ = sdpa_attention_forward(module, next_query, next_key, next_value, visible, **keywords)
    return torch.cat([attended, next_attended], dim=1)


AttentionInterface.register(_NAME, _attend)


def can_pack_rows(trunk: nn.Module) -> bool:
    """Return whether ``packed_hidden_states`` computes the rows of a model as it is now."""
    # Gradient checkpointing recomputes layers after ``packed_hidden_states`` has returned.
    return not recomputes_layers(trunk) and allows_packed_rows(trunk)


@once_per_architecture
def allows_packed_rows(trunk: Any) -> bool:
    """Return whether a model computes each sequence of a packed row as if it were alone.

    The first call for an architecture makes three short forward passes. ``Policy`` and ``ScalarModel`` make it when
    they are created.

    Models with a recurrent state, a sliding window, a mask that depends on the tokens or an attention implementation
    other than SDPA do not.
    """
    if not has_full_sdpa(trunk.config):
        return False
    tokens = torch.arange(1, 13, device=trunk.device) % trunk.config.get_text_config().vocab_size
    positions, sequences = (torch.tensor(x, device=trunk.device) for x in (_PROBE_POSITIONS, _PROBE_SEQUENCES))
    padded = PaddedRows.of(SharedPrompts(_PROBE), torch.arange(len(tokens), device=trunk.device))
    try:
        with probing(trunk):
            expected = trunk(input_ids=tokens[sequences], use_cache=False).last_hidden_state
            found = [_packed(trunk, tokens, positions, _PROBE, rows)[sequences] for rows in (None, padded)]
    except FAILURES:
        return False
    return all(are_close(states, expected) for states in found)
