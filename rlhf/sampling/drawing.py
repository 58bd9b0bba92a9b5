"""The choice of the next token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.sampling.params import SamplingParams

INVALID_TOKEN = -1  # stands for a token whose logits were NaN or infinite
BLOCK = 128  # tokens whose probabilities are summed first in a draw


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
