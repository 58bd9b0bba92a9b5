"""Decoding with a preallocated cache and without the modules of transformers.

A row of the cache holds a response. Rows have their own lengths, so a free row can be filled with the next prompt while
the other rows go on, and moving the last row into a free one closes a gap.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.models import cache_name
from rlhf.sampling.batch import DecodingBatch
from rlhf.sampling.lean_layers import Function, attention_decoder, linear
from rlhf.tensors import pad_right, upload


class LeanBatch(DecodingBatch):
    """Base class of the lean decoders. Equal prompts are computed once.

    Args:
        lm: The model.
        max_rows: Largest number of rows.
        capacity: Largest number of tokens of a row, prompt and response.
    """

    def __init__(self, lm: PreTrainedModel, max_rows: int, capacity: int) -> None:
        self.lm: Any = lm
        self.max_rows, self.capacity, self.device = max_rows, capacity, lm.device
        self.output_layer: Function = linear(self.lm.get_output_embeddings())
        self.count = 0  # rows in use: the first ones

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        unique = {tuple(prompt): number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        source = upload([unique[tuple(prompt)] for prompt in prompts], self.device)
        hidden = self._fill(upload(rows, self.device), source, [list(prompt) for prompt in unique])
        self.count = max(self.count, max(rows) + 1)
        return self.logits(hidden[source])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of last hidden states: [rows, width] to [rows, vocabulary]."""
        # Drawing a token reads each row several times, which is slow if its logits are not neighbors in memory.
        return self.output_layer(hidden).contiguous()

    @abstractmethod
    def _fill(self, rows: Tensor, source: Tensor, prompts: list[list[int]]) -> Tensor:
        """Compute prompts and place them in rows of the cache.

        Args:
            rows: [rows] the rows.
            source: [rows] index of the prompt of each row.
            prompts: The prompts.

        Returns:
            [prompts, width] last hidden states of the last token of each prompt.
        """

    @abstractmethod
    def _move(self, source: int, target: int) -> None:
        """Copy the cache of one row to another."""

    def remove(self, rows: Sequence[int]) -> list[int]:
        order = list(range(self.count))
        removed = set(rows)
        self.count -= len(rows)
        # The last rows replace them.
        free = [row for row in rows if row < self.count]
        moved = [row for row in order[self.count :] if row not in removed]
        for target, source in zip(free, moved, strict=True):
            self._move(source, target)
            order[target] = source
        return order[: self.count]


class AttentionBatch(LeanBatch):
    """Decoding of models with full attention, see ``has_attention_decoder``."""

    def __init__(self, lm: PreTrainedModel, max_rows: int, capacity: int) -> None:
        super().__init__(lm, max_rows, capacity)
        self.decoder = attention_decoder(lm, capacity)
        self.lengths = torch.zeros(max_rows, dtype=torch.long, device=self.device)
        self.host_lengths = [0] * max_rows  # the same on the host
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        logits = super().prefill(rows, prompts)
        for row, prompt in zip(rows, prompts, strict=True):
            self.host_lengths[row] = len(prompt)
        return logits

    def _fill(self, rows: Tensor, source: Tensor, prompts: list[list[int]]) -> Tensor:
        input_ids, mask = pad_right(prompts)
        # Padding is on the right, where causality keeps it away from real tokens. GPT-2 would warn about it.
        embeddings = self.lm.get_input_embeddings()(upload(input_ids, self.device))
        output = self.lm.base_model(inputs_embeds=embeddings, use_cache=True)
        last = upload(mask.sum(dim=1), self.device) - 1
        layers = getattr(output, cache_name(self.lm)).layers
        if not self.keys:
            self._allocate(layers)
        for layer, keys, values in zip(layers, self.keys, self.values, strict=True):
            keys[rows, :, : input_ids.shape[1]] = layer.keys[source].to(keys.dtype)
            values[rows, :, : input_ids.shape[1]] = layer.values[source].to(values.dtype)
        self.lengths[rows] = last[source] + 1
        hidden: Tensor = output.last_hidden_state
        return hidden[torch.arange(len(prompts), device=self.device), last]

    def _allocate(self, layers: Sequence[Any]) -> None:
        """Allocate the cache with the shapes of a cache of transformers."""
        for layer in layers:
            _, heads, _, width = layer.values.shape
            # Zeros, because masked values that are NaN would reach the result. Keys have the dtype of values, to which
            # attention converts them under autocast.
            for cache in (self.keys, self.values):
                cache.append(layer.values.new_zeros(self.max_rows, heads, self.capacity, width))

    def decode(self, tokens: Tensor) -> Tensor:
        lengths, host = self.lengths[: self.count], self.host_lengths[: self.count]
        position: Any
        rows: Any
        longest = max(host) + 1
        if min(host) + 1 == longest:
            rows, position, mask = slice(self.count), longest - 1, None
        else:
            rows, position = torch.arange(self.count, device=self.device), lengths.clamp(max=self.capacity - 1)
            mask = (torch.arange(longest, device=self.device) <= lengths[:, None])[:, None, None]
        hidden, positions = self.decoder.start(tokens, position)
        for layer, keys, values in zip(self.decoder.layers, self.keys, self.values, strict=True):
            query, key, value = layer.projections(hidden, positions)
            keys[rows, :, position] = key.to(keys.dtype)
            values[rows, :, position] = value.to(values.dtype)
            cached = keys[: self.count, :, :longest], values[: self.count, :, :longest]
            # Query heads that share a key head take the place of query positions, so that no key is repeated.
            grouped = query.reshape(len(query), keys.shape[1], -1, layer.head_width)
            attended = F.scaled_dot_product_attention(grouped, *cached, mask, scale=layer.scale)
            hidden = layer.output(hidden, attended.reshape(len(hidden), -1))
        self.lengths[: self.count] += 1
        self.host_lengths[: self.count] = [length + 1 for length in host]
        return self.logits(self.decoder.norm(hidden))

    def rewind(self, rows: Sequence[int]) -> None:
        self.lengths[list(rows)] = 0
        for row in rows:
            self.host_lengths[row] = 0

    def _move(self, source: int, target: int) -> None:
        length = self.host_lengths[target] = self.host_lengths[source]
        for cache in (*self.keys, *self.values):
            cache[target, :, :length] = cache[source, :, :length]
        self.lengths[target] = self.lengths[source]
