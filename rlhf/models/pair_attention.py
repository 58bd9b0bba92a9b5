"""Attention of rows that consist of a prompt and two responses, without computing what a mask would remove."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

Sizes: TypeAlias = tuple[int, int, int]  # tokens of a prompt and of the rests of both sequences

_NAME = "rlhf_pairs"
_rows: ContextVar[Sequence[Sizes]] = ContextVar("rows")


@contextmanager
def pair_attention(trunk: Any, rows: Sequence[Sizes]) -> Iterator[None]:
    """Let the attention layers of a model compute the two sequences of each row one after the other.

    SDPA with a mask computes all products of queries and keys, including those that the mask removes. Without one, it
    computes about half of them.

    Args:
        trunk: A model whose attention implementation is SDPA.
        rows: The sizes of each row. Further tokens of a row are padding.
    """
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
    """Compute attention as transformers calls it. The mask, which ``pair_attention`` replaces, is not used."""
    keywords.pop("is_causal", None)
    outputs = []
    for sizes, *row in zip(_rows.get(), *(x.split(1) for x in (query, key, value)), strict=True):
        outputs.append(_attend_row(module, sizes, *row, **keywords))
    return torch.cat(outputs), None


def _attend_row(module: nn.Module, sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
    """Compute the attention of one row: [1, heads, time, width] queries to [1, time, heads, width]."""
    prompt, first, second = sizes
    padding = query.shape[2] - prompt - first - second
    (query, next_query, _), (key, next_key, _), (value, next_value, _) = (
        x.split([prompt + first, second, padding], dim=2) for x in (query, key, value)
    )
    attended, _ = sdpa_attention_forward(module, query, key, value, None, is_causal=True, **keywords)
    next_key = torch.cat([key[:, :, :prompt], next_key], dim=2)
    next_value = torch.cat([value[:, :, :prompt], next_value], dim=2)
    visible = torch.ones(1, 1, second, prompt + second, dtype=torch.bool, device=query.device).tril(prompt)
    next_attended, _ = sdpa_attention_forward(module, next_query, next_key, next_value, visible, **keywords)
    return F.pad(torch.cat([attended, next_attended], dim=1), (0, 0, 0, 0, 0, padding))


AttentionInterface.register(_NAME, _attend)
