"""Log-prob, entropy and argmax match of given tokens from their logits."""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.models.autocast import without_autocast
from rlhf.speed import speed_settings

EntropyMode: TypeAlias = Literal["none", "value", "grad"]
CACHED_BYTES = 2**20  # rows of logits of this size stay in the cache of a CPU core between two operations


def token_statistics(
    logits: Tensor, targets: Tensor, temperature: float, entropy: EntropyMode, is_argmax: bool
) -> tuple[Tensor, ...]:
    """Return the log-prob of each target token and, if requested, the entropy and the argmax match, [tokens] each.

    Args:
        logits: [tokens, vocabulary] float32 logits. With ``speed.fused_logprobs``, their memory is used for the
            gradient, so the caller must not read them afterwards.
        targets: [tokens] token ids.
        temperature: Divisor of the logits.
        entropy: Whether to compute the entropy, and whether it has a gradient.
        is_argmax: Whether to compute if each target is the most likely token.
    """
    if speed_settings().fused_logprobs:
        with without_autocast(logits.device):
            results: tuple[Tensor, ...] = _TokenStatistics.apply(logits, targets, temperature, entropy, is_argmax)  # type: ignore[no-untyped-call]
        return results
    return _separate_statistics(logits if temperature == 1 else logits / temperature, targets, entropy, is_argmax)


def _separate_statistics(logits: Tensor, targets: Tensor, entropy: EntropyMode, is_argmax: bool) -> tuple[Tensor, ...]:
    """Compute the statistics with operations of which autograd stores the results."""
    logp = logits.log_softmax(dim=-1)
    results = [logp.gather(-1, targets[:, None])[:, 0]]
    if entropy == "grad":
        results.append(-(logp.exp() * logp).sum(dim=-1))
    with torch.no_grad():
        if entropy == "value":
            results.append(-logp.exp().mul_(logp).sum(dim=-1))
        if is_argmax:
            results.append(logits.gather(-1, targets[:, None])[:, 0] == logits.amax(dim=-1))
    return tuple(results)


class _TokenStatistics(torch.autograd.Function):
    """The statistics from one buffer: logits become probabilities in the forward and gradients in the backward pass.

    log p_y = x_y - m + log p_m,    H = m - log p_m - sum_v p_v x_v,    m = max_v x_v, p_m its probability
    dL/dx_v = g_y (1[v = y] - p_v) - g_H p_v (log p_v + H)
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: EntropyMode, is_argmax: bool
    ) -> tuple[Tensor, ...]:
        columns = targets[:, None]
        if temperature != 1:
            logits.div_(temperature)
        at_target, largest = logits.gather(1, columns), logits.amax(dim=1, keepdim=True)
        entropies = torch.empty_like(largest) if entropy != "none" else None
        log_largest = torch.empty_like(largest)  # log p_m
        size = _cached_rows(logits)
        for i in range(0, len(logits), size):
            rows = slice(i, i + size)
            x = logits[rows]
            probabilities = x.softmax(dim=1)
            log_largest[rows] = probabilities.amax(dim=1, keepdim=True).log_()
            if entropies is not None:
                mean = torch.linalg.vecdot(probabilities, x)[:, None]
                entropies[rows] = largest[rows] - log_largest[rows] - mean
            x.copy_(probabilities)
        ctx.save_for_backward(logits, columns, entropies if entropy == "grad" else None)
        ctx.temperature = temperature
        results = [(at_target - largest + log_largest)[:, 0]]
        constants = []
        if entropies is not None:
            results.append(entropies[:, 0])
            constants += results[1:] if entropy == "value" else []
        if is_argmax:
            results.append((at_target == largest)[:, 0])
            constants.append(results[-1])
        ctx.mark_non_differentiable(*constants)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        gradient, columns, entropies = ctx.saved_tensors  # probabilities, until they are overwritten
        grad = grad[:, None] / ctx.temperature
        size = _cached_rows(gradient)
        for i in range(0, len(gradient), size):
            rows = slice(i, i + size)
            p = gradient[rows]
            if entropies is None:
                p.mul_(-grad[rows])
            else:
                scale = others[0][rows, None] / ctx.temperature
                p.copy_(scale * (torch.special.entr(p) - p * entropies[rows]) - grad[rows] * p)
        gradient.scatter_add_(1, columns, grad)
        return gradient, None, None, None, None


def _cached_rows(logits: Tensor) -> int:
    """Return the number of rows that are computed at once."""
    return max(CACHED_BYTES // (logits.element_size() * logits.shape[1]), 1) if logits.is_cpu else max(len(logits), 1)
