"""Token-by-token decoding: the cached forward pass and the choice of the next token."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from rlhf.models import cache_name
from rlhf.sampling.params import SamplingParams
from rlhf.tensors import pad_right

INVALID_TOKEN = -1  # stands for a token whose logits were NaN or infinite
SMALLEST_NOISE = 2**-24  # Float32 generators resolve no smaller values: on some devices, they return 0 instead.


class DecodingBatch:
    """The unfinished rows of a batch and the model's cache for them.

    Prompts are padded on the left, so that the next token of every row has the same index. Positions count from the
    first real token.

    Args:
        lm: Causal language model.
        prompts: Token ids of each prompt, at least one per prompt.
    """

    def __init__(self, lm: PreTrainedModel, prompts: list[list[int]]) -> None:
        self.lm = lm
        reversed_ids, reversed_mask = pad_right([prompt[::-1] for prompt in prompts])
        self.input_ids = reversed_ids.flip(1).to(lm.device)
        self.attention_mask = reversed_mask.flip(1).to(lm.device)
        self.position_ids = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        self.padded = len({len(prompt) for prompt in prompts}) > 1
        self.arguments = signature(lm.forward).parameters
        self.cache_name = cache_name(lm)
        self.cache: Any = None

    def next_logits(self) -> Tensor:
        """Compute the logits of each row's next token: [rows, vocabulary]."""
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
        return [layer for layer in self.cache.layers if isinstance(layer, CacheLayerMixin)]

    def keep(self, rows: Tensor) -> None:
        """Remove all other rows from the batch and from the cache."""
        self.cache.reorder_cache(rows)
        self.attention_mask, self.position_ids = self.attention_mask[rows], self.position_ids[rows]

    def append(self, tokens: Tensor) -> None:
        """Append one token to each row: [rows] token ids. Only these are read in the next step."""
        self.input_ids = tokens[:, None]
        self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(len(tokens), 1)], dim=1)
        self.position_ids = self.position_ids[:, -1:] + 1


def draw_tokens(logits: Tensor, params: SamplingParams, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row, without reading anything on the host.

    The draw is an exponential race: token v gets the arrival time E_v / p_v, where E_v is exponential noise of rate 1,
    and the token that arrives first has distribution p.

    Args:
        logits: [rows, vocabulary] next-token logits.
        params: Temperature and filters.
        generator: Random state, on the device of the logits. None: the global random state of torch.

    Returns:
        [rows] token ids; ``INVALID_TOKEN`` in rows whose largest logit is NaN or infinite.
    """
    valid = logits.amax(dim=-1).isfinite()
    if params.temperature == 0:
        return torch.where(valid, logits.argmax(dim=-1), INVALID_TOKEN)
    logits = filter_logits(logits.float() / params.temperature, top_k=params.top_k, top_p=params.top_p)
    probabilities = logits.softmax(dim=-1)
    # With noise of exactly 0, which is not rare in a large vocabulary, even the least likely token would win.
    noise = torch.empty_like(probabilities).exponential_(generator=generator).clamp_(min=SMALLEST_NOISE)
    return torch.where(valid, probabilities.div_(noise).argmax(dim=-1), INVALID_TOKEN)


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
        remove = probabilities.cumsum(dim=-1) - probabilities >= int(top_p * 2**40)
        logits = logits.masked_fill(remove.scatter(-1, order, remove), -torch.inf)
    return logits
