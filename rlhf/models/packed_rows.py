"""Rows of a batch one after another in a single row without padding, each of which attends to itself only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf.models.probes import FAILURES, are_close, once_per_model, probing

# Number of tokens of a prompt and of the rests of both sequences. An ordinary row has no third part.
Sizes: TypeAlias = tuple[int, int, int]

_NAME = "rlhf_packed_rows"
_rows: ContextVar[Sequence[Sizes]] = ContextVar("rows")
# A pair and an ordinary row, which are three sequences of five tokens.
_PROBE: list[Sizes] = [(3, 2, 2), (0, 5, 0)]
_PROBE_POSITIONS = [[0, 1, 2, 3, 4, 3, 4], [0, 1, 2, 3, 4, 0, 0]]
_PROBE_SEQUENCES = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6], [7, 8, 9, 10, 11]]  # places of their tokens


def packed_hidden_states(trunk: Any, input_ids: Tensor, position_ids: Tensor, rows: Sequence[Sizes]) -> Tensor:
    """Compute the last hidden states of all rows in one row: [tokens, width], row by row.

    Args:
        trunk: A model that ``allows_packed_rows``.
        input_ids: [rows, time] token ids, padded on the right.
        position_ids: [rows, time] positions of the tokens in their sequence.
        rows: The sizes of each row.
    """
    lengths = torch.tensor([sum(sizes) for sizes in rows])
    real = (torch.arange(input_ids.shape[1]) < lengths[:, None]).flatten().nonzero()[:, 0].to(input_ids.device)
    input_ids, position_ids = (x.flatten()[real][None] for x in (input_ids, position_ids))
    with _attention_within(trunk, rows):
        states: Tensor = trunk(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    return states[0]


@contextmanager
def _attention_within(trunk: Any, rows: Sequence[Sizes]) -> Iterator[None]:
    """Let the attention layers of a model compute one row after the other."""
    config = trunk.config.get_text_config()
    before, token = config._attn_implementation, _rows.set(rows)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _rows.reset(token)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    """Compute attention as transformers calls it. There is no mask, because no row sees another one."""
    keywords.pop("is_causal", None)
    rows = _rows.get()
    lengths = [sum(sizes) for sizes in rows]
    parts = zip(rows, *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([_attend_row(module, *part, **keywords) for part in parts], dim=1), None


def _attend_row(module: nn.Module, sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
    """Compute the attention of one row: [1, heads, time, width] queries to [1, time, heads, width].

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
    recomputes = any(getattr(part, "gradient_checkpointing", False) for part in trunk.modules())
    return not recomputes and allows_packed_rows(trunk)


def has_full_attention(trunk: Any) -> bool:
    """Return whether every layer attends to all earlier tokens, which a short probe would not find out."""
    config = trunk.config.get_text_config()
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = getattr(config, "layer_types", None) or ()
    return config._attn_implementation == "sdpa" and not window and set(kinds) <= {"full_attention"}


@once_per_model
def allows_packed_rows(trunk: Any) -> bool:
    """Return whether a model computes each sequence of a packed row as if it was alone.

    The first call for a model makes two short forward passes. ``Policy`` and ``ScalarModel`` make it when they are
    created.

    Models with a recurrent state, with a sliding window and with another attention implementation than SDPA do not.
    """
    if not has_full_attention(trunk):
        return False
    tokens = torch.arange(1, 15, device=trunk.device).view(2, 7) % trunk.config.get_text_config().vocab_size
    positions, sequences = (torch.tensor(x, device=trunk.device) for x in (_PROBE_POSITIONS, _PROBE_SEQUENCES))
    try:
        with probing(trunk):
            found = packed_hidden_states(trunk, tokens, positions, _PROBE)[sequences]
            expected = trunk(input_ids=tokens.flatten()[sequences], use_cache=False).last_hidden_state
    except FAILURES:
        return False
    return are_close(found, expected)
