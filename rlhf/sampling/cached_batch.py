"""Decoding with the modules and the cache of transformers."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from rlhf.models import cache_name
from rlhf.sampling.batch import DecodingBatch
from rlhf.tensors import pad_rows_left, upload


class CachedBatch(DecodingBatch):
    """Decoding of any model. All rows are filled at once, and a prompt cannot take the place of a finished row.

    Prompts are padded on the left, so that the next token of every row has the same index. Positions count from the
    first real token.

    Args:
        lm: Causal language model.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm
        self.arguments = signature(lm.forward).parameters
        self.cache_name = cache_name(lm)
        self.cache: Any = None

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        self.count = len(rows)
        padded = pad_rows_left([list(prompt) for prompt in prompts])
        self.input_ids, self.attention_mask = (tensor.to(self.lm.device) for tensor in padded)
        self.position_ids = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        self.padded = len({len(prompt) for prompt in prompts}) > 1
        return self._next_logits()

    def decode(self, tokens: Tensor) -> Tensor:
        self.input_ids = tokens[:, None]
        self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(len(tokens), 1)], dim=1)
        self.position_ids = self.position_ids[:, -1:] + 1
        return self._next_logits()

    def _next_logits(self) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": True, self.cache_name: self.cache}
        # Attention needs the mask of all cached tokens at every step. A recurrent state contains no padding after the
        # prompt, and Mamba-1 and Falcon-Mamba would broadcast the longer mask against the single new token.
        if self.padded and (self.cache is None or self._attention_layers()):
            inputs["attention_mask"] = self.attention_mask.long()
        if "position_ids" in self.arguments:
            inputs["position_ids"] = self.position_ids
        if "logits_to_keep" in self.arguments:
            inputs["logits_to_keep"] = 1
        output = self.lm(**inputs)
        is_prompt = self.cache is None
        self.cache = getattr(output, self.cache_name)
        if is_prompt:
            self._always_use_the_mask()
        logits: Tensor = output.logits[:, -1]
        return logits

    def _always_use_the_mask(self) -> None:
        """Stop transformers from reading the mask on the host in every step to find out whether it contains padding.

        It does not do so for caches that can be compiled.
        """
        if self.padded:
            for layer in self._attention_layers():
                layer.is_compileable = True

    def _attention_layers(self) -> list[Any]:
        """Return the layers of the cache that contain keys and values; hybrid models have recurrent layers as well."""
        # Decoders with cross-attention have a second cache, which is empty without an encoder.
        cache = getattr(self.cache, "self_attention_cache", self.cache)
        return [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]

    def remove(self, rows: Sequence[int]) -> list[int]:
        order = sorted(set(range(self.count)) - set(rows))
        index = upload(order, self.lm.device)
        self.cache.reorder_cache(index)
        self.attention_mask, self.position_ids = self.attention_mask[index], self.position_ids[index]
        self.count = len(order)
        return order
