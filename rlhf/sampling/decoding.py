"""Token-by-token decoding: the cached forward pass and the choice of the next token."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from rlhf.models import cache_name
from rlhf.sampling.params import SamplingParams
from rlhf.tensors import pad_rows_left

INVALID_TOKEN = -1  # stands for a token whose logits were NaN or infinite
BLOCK = 128  # tokens whose probabilities are summed first in a draw


class DecodingBatch:
    """The rows of a batch that are being decoded, and the cache of transformers for them.

    Prompts are padded on the left, so that the next token of every row has the same index. Positions count from the
    first real token.

    Args:
        lm: Causal language model.
        max_rows: Number of rows.
        capacity: Unused. Decoders that allocate their cache in advance need the largest number of tokens of a row.
    """

    can_refill = False  # Whether a prompt can replace a finished row.

    def __init__(self, lm: PreTrainedModel, max_rows: int, capacity: int) -> None:
        self.lm = lm
        self.arguments = signature(lm.forward).parameters
        self.cache_name = cache_name(lm)
        self.count = max_rows
        self.cache: Any = None

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute the prompts of all rows and return the logits of the first token of each response.

        Args:
            rows: All rows.
            prompts: Token ids of each prompt, at least one per prompt.
        """
        padded = pad_rows_left([list(prompt) for prompt in prompts])
        self.input_ids, self.attention_mask = (tensor.to(self.lm.device) for tensor in padded)
        self.position_ids = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        self.padded = len({len(prompt) for prompt in prompts}) > 1
        return self._next_logits()

    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token to each row and return the logits of the next one: [rows] to [rows, vocabulary]."""
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
        """Remove rows from the batch and from the cache, and return the former indices of those that are left."""
        order = sorted(set(range(self.count)) - set(rows))
        index = torch.tensor(order, device=self.lm.device)
        self.cache.reorder_cache(index)
        self.attention_mask, self.position_ids = self.attention_mask[index], self.position_ids[index]
        self.count = len(order)
        return order


def draw_tokens(
    logits: Tensor, params: SamplingParams, generator: torch.Generator | None = None, ranks: Tensor | None = None
) -> Tensor:
    """Draw one token per row, without reading anything on the host.

    The draw inverts the cumulative distribution, first that of blocks of tokens and then that of the tokens in the
    block. Probabilities are counted in integers, because a GPU has no deterministic cumulative sum of floats.

    Args:
        logits: [rows, vocabulary] next-token logits.
        params: Temperature and filters.
        generator: Random state, on the device of the logits. None: the global random state of torch.
        ranks: [rows] which of the random numbers each row gets. None: in order.

    Returns:
        [rows] token ids; ``INVALID_TOKEN`` in rows whose largest logit is NaN or infinite.
    """
    valid = logits.amax(dim=-1).isfinite()
    if params.temperature == 0:
        return torch.where(valid, logits.argmax(dim=-1), INVALID_TOKEN)
    logits = filter_logits(logits.float() / params.temperature, top_k=params.top_k, top_p=params.top_p)
    probabilities = logits.softmax(dim=-1)
    blocks = F.pad(probabilities, (0, -probabilities.shape[1] % BLOCK)).view(len(logits), -1, BLOCK)
    random = torch.randint(2**30, (2, len(logits)), device=logits.device, generator=generator)
    random = random if ranks is None else random[:, ranks]
    block = _choose(blocks.sum(dim=-1), random[0])
    within = _choose(blocks[torch.arange(len(logits), device=logits.device), block], random[1])
    tokens = (block * BLOCK + within).clamp(max=logits.shape[1] - 1)
    return torch.where(valid, tokens, INVALID_TOKEN)


def _choose(weights: Tensor, random: Tensor) -> Tensor:
    """Choose an index per row with probabilities in proportion to its weights.

    Args:
        weights: [rows, choices] weights of at least 0. The result is undefined in rows with NaN.
        random: [rows] random integers below 2^30.

    Returns:
        [rows] indices. A weight of 0 is never chosen.
    """
    relative = (weights / weights.amax(dim=-1, keepdim=True)).nan_to_num()
    cumulative = (relative * 2**40).long().cumsum(dim=-1)
    total = cumulative[:, -1]
    # random / 2^30 * total, rounded down. Its parts do not overflow, and rounding errors of weights change it little.
    target = (total >> 30) * random + ((total & (2**30 - 1)) * random >> 30)
    return (cumulative <= target[:, None]).sum(dim=-1).clamp(max=weights.shape[1] - 1)


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set the logits of tokens outside top-k and top-p to minus infinity.

    Args:
        logits: [rows, vocabulary] logits, already divided by the temperature.
        top_k: Number of tokens to keep; 0 keeps all.
        top_p: Total probability of the tokens to keep, computed after the top-k filter; 1 keeps all.

    Returns:
        [rows, vocabulary] logits. The most likely token is always kept.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        # Probabilities are counted in integers, because a GPU has no deterministic cumulative sum of floats.
        probabilities = (ordered.softmax(dim=-1) * 2**40).long()
        remove = probabilities.cumsum(dim=-1) - probabilities >= max(int(top_p * 2**40), 1)
        logits = logits.masked_fill(remove.scatter(-1, order, remove), -torch.inf)
    return logits
