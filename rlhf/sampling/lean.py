"""Decoding of models of the Llama family with a preallocated cache and without the modules of transformers.

A row of the cache is a place for a response. Rows have their own lengths, so a place can be filled with the next prompt
while the other rows go on, and moving the last row into a free place closes a gap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.activations import SiLUActivation

from rlhf.models import is_sharded
from rlhf.speed import speed_settings
from rlhf.tensors import pad_right

FAMILY = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
ROTARY_TYPES = ("default", "linear", "llama3", "yarn")  # positions are encoded independently of the length
Function: TypeAlias = Callable[[Tensor], Tensor]


def has_lean_decoder(lm: PreTrainedModel) -> bool:
    """Return whether ``LeanBatch`` computes the logits of a model, and ``speed.lean_decoding`` is on."""
    if not speed_settings().lean_decoding or type(lm) not in FAMILY or is_sharded(lm):
        return False
    config: Any = lm.config
    has_full_attention = set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return has_full_attention and not window and config.rope_parameters["rope_type"] in ROTARY_TYPES


class LeanBatch:
    """The rows of a batch that are being decoded, and their cache.

    Args:
        lm: A model for which ``has_lean_decoder`` is True.
        places: Largest number of rows.
        capacity: Largest number of tokens of a row, prompt and response.
    """

    can_refill = True

    def __init__(self, lm: PreTrainedModel, places: int, capacity: int) -> None:
        self.lm: Any = lm
        self.places, self.capacity, self.device = places, capacity, lm.device
        self.layers = [_Layer.of(layer) for layer in self.lm.model.layers]
        self.norm, self.head = _norm(self.lm.model.norm), _linear(self.lm.lm_head)
        self.embedding = self.lm.model.embed_tokens
        self.count = 0  # rows in use: the first ones
        self.lengths = torch.zeros(places, dtype=torch.long, device=self.device)
        self.host_lengths = [0] * places  # the same on the host
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute prompts and place each of them in a row. Equal prompts are computed once.

        Args:
            rows: The rows, which are unused or finished.
            prompts: Token ids of the prompt of each row.

        Returns:
            [rows, vocabulary] logits of the first token of each response.
        """
        unique = {tuple(prompt): number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        input_ids, mask = pad_right([list(prompt) for prompt in unique])
        # Padding is on the right, where causality keeps it away from real tokens.
        output = self.lm.model(input_ids=input_ids.to(self.device), use_cache=True)
        source = torch.tensor([unique[tuple(prompt)] for prompt in prompts], device=self.device)
        target, last = torch.tensor(rows, device=self.device), mask.sum(dim=1).to(self.device) - 1
        cache = output.cache if hasattr(output, "cache") else output.past_key_values
        if not self.keys:
            self._allocate(cache.layers)
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            keys[target, :, : input_ids.shape[1]] = layer.keys[source].to(keys.dtype)
            values[target, :, : input_ids.shape[1]] = layer.values[source]
        self.lengths[target] = last[source] + 1
        for row, prompt in zip(rows, prompts, strict=True):
            self.host_lengths[row] = len(prompt)
        self.count = max(self.count, max(rows) + 1)
        return self.head(output.last_hidden_state[source, last[source]])

    def _allocate(self, layers: Sequence[Any]) -> None:
        """Allocate the cache with the shapes of a cache of transformers, and the tables of rotary positions."""
        for layer in layers:
            _, heads, _, width = layer.values.shape
            # Zeros, because masked values that are NaN would reach the result. Keys have the dtype of values, to which
            # attention converts them under autocast.
            new = partial(layer.values.new_zeros, (self.places, heads, self.capacity, width))
            self.keys.append(new())
            self.values.append(new())
        positions = torch.arange(self.capacity, device=self.device)[None]
        cos, sin = self.lm.model.rotary_emb(self.embedding(positions[:, :1]), position_ids=positions)
        half = sin.shape[-1] // 2
        self.cos, self.sin = cos[0, :, None], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)[:, None]

    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token to each row and return the logits of the next one: [rows] to [rows, vocabulary]."""
        lengths, host = self.lengths[: self.count], self.host_lengths[: self.count]
        position: Any
        rows: Any
        longest = max(host) + 1
        if min(host) + 1 == longest:
            rows, position, mask = slice(self.count), longest - 1, None
            cos, sin = self.cos[longest - 1], self.sin[longest - 1]
        else:
            rows, position = torch.arange(self.count, device=self.device), lengths.clamp(max=self.capacity - 1)
            cos, sin = self.cos[position], self.sin[position]
            mask = (torch.arange(longest, device=self.device) <= lengths[:, None])[:, None, None]
        hidden = self.embedding(tokens)
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            query, key, value = layer.projections(hidden, cos, sin)
            keys[rows, :, position] = key.to(keys.dtype)
            values[rows, :, position] = value
            cached = keys[: self.count, :, :longest], values[: self.count, :, :longest]
            hidden = layer.output(hidden, query, *cached, mask)
        self.lengths[: self.count] += 1
        self.host_lengths[: self.count] = [length + 1 for length in host]
        return self.head(self.norm(hidden))

    def rewind(self, rows: Sequence[int]) -> None:
        """Let finished rows that stay in the batch start again, so that they neither outgrow the cache nor slow it."""
        self.lengths[list(rows)] = 0
        for row in rows:
            self.host_lengths[row] = 0

    def remove(self, rows: Sequence[int]) -> list[int]:
        """Remove rows from the batch. The last rows move into their places.

        Args:
            rows: The rows, in ascending order.

        Returns:
            The former index of each row that is left.
        """
        order = list(range(self.count))
        removed = set(rows)
        self.count -= len(rows)
        free = [row for row in rows if row < self.count]
        moved = [row for row in order[self.count :] if row not in removed]
        for target, source in zip(free, moved, strict=True):
            length = self.host_lengths[target] = self.host_lengths[source]
            for cache in (*self.keys, *self.values):
                cache[target, :, :length] = cache[source, :, :length]
            self.lengths[target] = self.lengths[source]
            order[target] = source
        return order[: self.count]


@dataclass
class _Layer:
    """The functions of a decoder layer for one token per row."""

    attention_norm: Function
    query: Function
    key: Function
    value: Function
    query_norm: Function | None
    key_norm: Function | None
    attention_output: Function
    mlp_norm: Function
    gate: Function
    up: Function
    down: Function
    activation: Function
    head_width: int
    scale: float

    @classmethod
    def of(cls, layer: Any) -> "_Layer":
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            attention_norm=_norm(layer.input_layernorm),
            query=_linear(attention.q_proj),
            key=_linear(attention.k_proj),
            value=_linear(attention.v_proj),
            query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            attention_output=_linear(attention.o_proj),
            mlp_norm=_norm(layer.post_attention_layernorm),
            gate=_linear(mlp.gate_proj),
            up=_linear(mlp.up_proj),
            down=_linear(mlp.down_proj),
            activation=F.silu if isinstance(mlp.act_fn, nn.SiLU | SiLUActivation) else mlp.act_fn,
            head_width=attention.head_dim,
            scale=attention.scaling,
        )

    def projections(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of one token per row: [rows, heads, width] each."""
        normed = self.attention_norm(hidden)
        query, key, value = (
            f(normed).view(len(hidden), -1, self.head_width) for f in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        both = torch.cat([query, key], dim=1)
        both = torch.addcmul(both * cos, both.roll(self.head_width // 2, dims=-1), sin)
        query, key = both.split([query.shape[1], key.shape[1]], dim=1)
        return query, key, value

    def output(self, hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Return the output of the layer: [rows, width]."""
        # The query heads that share a key head take the place of query positions, so that no key is repeated.
        grouped = query.view(len(query), keys.shape[1], -1, self.head_width)
        attended = F.scaled_dot_product_attention(grouped, keys, values, mask, scale=self.scale)
        hidden = hidden + self.attention_output(attended.reshape(len(hidden), -1))
        normed = self.mlp_norm(hidden)
        return hidden + self.down(self.activation(self.gate(normed)) * self.up(normed))


def _linear(module: Any) -> Function:
    """Return a plain linear layer as a function. Other layers, such as those with an adapter, are returned."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return module  # type: ignore[no-any-return]
    return partial(F.linear, weight=module.weight, bias=module.bias)


def _norm(module: Any) -> Function:
    """Return an RMS norm of transformers as a function."""
    return partial(F.rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=module.variance_epsilon)
