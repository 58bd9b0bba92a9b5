"""Objectives of on-policy training: KL estimators, token rewards, policy loss and value loss.

Per-token tensors have shape [batch, time], and entry t belongs to token t. ``response_mask`` is True on response
tokens, including EOS. Log-probs, KL and entropy are in nats; rewards, values and returns are in reward units.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rlhf.tensors import last_true, masked_mean, masked_variance, mean_over_ranks, sequence_mean, sequence_sum

LossReduction: TypeAlias = Literal["token_mean", "sequence_mean", "sequence_sum"]
ROUNDING = 1e-5  # largest relative rounding error of returns, which are sums over tokens in float32


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(pi || ref) by the log-ratio of tokens sampled from pi.

        k1 = log pi - log ref

    The estimate is unbiased and may be negative. Its gradient is zero in expectation, so it cannot serve as a loss.

    Args:
        logprobs: [batch, time] log-probs under the policy.
        ref_logprobs: [batch, time] log-probs under the reference model.

    Returns:
        [batch, time] estimates, in nats.

    Reference: J. Schulman, "Approximating KL divergence".
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(pi || ref) by half the squared log-ratio of tokens sampled from pi.

        k2 = (log pi - log ref)^2 / 2

    The estimate is never negative and is biased when the policies are far apart. Its gradient is an unbiased estimate
    of the gradient of the KL divergence.

    Args:
        logprobs: [batch, time] log-probs under the policy.
        ref_logprobs: [batch, time] log-probs under the reference model.

    Returns:
        [batch, time] estimates, in nats.

    Reference: J. Schulman, "Approximating KL divergence".
    """
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(pi || ref) by k1 plus a control variate of mean 0.

        k3 = r - 1 - log r,    r = ref / pi

    The estimate is unbiased and never negative.

    Args:
        logprobs: [batch, time] log-probs under the policy.
        ref_logprobs: [batch, time] log-probs under the reference model.

    Returns:
        [batch, time] estimates, in nats.

    Reference: J. Schulman, "Approximating KL divergence". As a loss: Shao et al. 2024, eq. 4 (arXiv:2402.03300).
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, *, kl_coef: float) -> Tensor:
    """Turn scores and KL into per-token rewards.

        r_t = -kl_coef * kl_t,    plus the score at the last response token

    Huang et al. 2024 (arXiv:2403.17031) add the score one position later, after a token that was not sampled. For
    gamma = lambda = 1 the advantages are the same.

    Args:
        scores: [batch] scores of the responses.
        kl: [batch, time] KL to the reference model at each token.
        response_mask: [batch, time] bool, True on response tokens including EOS.
        kl_coef: KL coefficient, in reward units per nat.

    Returns:
        [batch, time] rewards; 0 on masked tokens.

    Reference: Ziegler et al. 2019, eq. 2 (arXiv:1909.08593).
    """
    rewards = torch.where(response_mask, -kl_coef * kl, 0.0)
    rows = torch.arange(len(scores), device=scores.device)
    return rewards.index_put((rows, last_true(response_mask)), scores, accumulate=True)


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    loss_reduction: Callable[[Tensor, Tensor], Tensor] = masked_mean,
) -> Tensor:
    """Clipped surrogate loss of PPO (lower is better).

        L   = -mean_t l_t,    l_t = min(r_t A_t, clip(r_t, 1 - eps_low, 1 + eps_high) A_t)
        r_t = exp(logprobs_t - old_logprobs_t)

    With dual clip c, tokens of negative advantage use max(l_t, c A_t) instead of l_t.

    Args:
        logprobs: [batch, time] log-probs under the current policy. Gradients flow through this argument only.
        old_logprobs: [batch, time] log-probs under the policy that sampled the tokens.
        advantages: [batch, time] advantages.
        response_mask: [batch, time] bool, True on response tokens including EOS.
        clip_range: eps_low, and eps_high unless ``clip_range_high`` is set.
        clip_range_high: eps_high; None: equal to ``clip_range``.
        dual_clip: c, above 1; None disables the dual clip.
        loss_reduction: Mean over tokens (``masked_mean``) or over sequences (``sequence_mean``, ``sequence_sum``).

    Returns:
        Scalar loss.

    Reference: Schulman et al. 2017, eq. 7 (arXiv:1707.06347). Two clip ranges: Yu et al. 2025, eq. 10
    (arXiv:2503.14476). Dual clip: Ye et al. 2020, eq. 4 (arXiv:1912.09729).
    """
    ratio = policy_ratio(logprobs, old_logprobs, response_mask)
    advantages = torch.where(response_mask, advantages, 0.0)
    high = clip_range if clip_range_high is None else clip_range_high
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + high) * advantages)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    return -loss_reduction(surrogate, response_mask)


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    clip_range: float | None,
    loss_reduction: Callable[[Tensor, Tensor], Tensor] = masked_mean,
) -> Tensor:
    """Clipped value loss of PPO: half the larger of the unclipped and the clipped squared error.

        L = mean_t max((V_t - R_t)^2, (V_clip_t - R_t)^2) / 2
        V_clip_t = V_old_t + clip(V_t - V_old_t, -eps, eps)

    Args:
        values: [batch, time] values under the current critic. Gradients flow through this argument only.
        old_values: [batch, time] values under the critic at sampling time.
        returns: [batch, time] regression targets.
        response_mask: [batch, time] bool, True on response tokens including EOS.
        clip_range: eps, in reward units; None disables clipping.
        loss_reduction: Mean over tokens (``masked_mean``) or over sequences (``sequence_mean``, ``sequence_sum``).

    Returns:
        Scalar loss, in squared reward units.

    Reference: Huang et al. 2024, detail 14 (arXiv:2403.17031), after the published code of Schulman et al. 2017.
    """
    values, old_values, returns = (torch.where(response_mask, tensor, 0.0) for tensor in (values, old_values, returns))
    errors = (values - returns).square()
    if clip_range is not None:
        clipped_values = old_values + (values - old_values).clamp(-clip_range, clip_range)
        errors = torch.maximum(errors, (clipped_values - returns).square())
    return 0.5 * loss_reduction(errors, response_mask)


def loss_reduction_function(name: str, max_new_tokens: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that reduces [batch, time] terms and their mask to a scalar loss."""
    if name == "sequence_sum":
        return partial(sequence_sum, length=max_new_tokens)
    return sequence_mean if name == "sequence_mean" else masked_mean


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Probability ratio of the current and the sampling policy at each token.

        r_t = exp(logprobs_t - old_logprobs_t)

    Args:
        logprobs: [batch, time] log-probs under the current policy.
        old_logprobs: [batch, time] log-probs under the policy that sampled the tokens.
        response_mask: [batch, time] bool, True on response tokens including EOS.

    Returns:
        [batch, time] ratios; 1 on masked tokens.
    """
    # Mask before exp: NaN or huge values on padding must not reach the result or the gradient.
    return torch.where(response_mask, logprobs - old_logprobs, 0.0).exp()


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor:
    """Fraction of the variance of the returns that the critic explains, over the response tokens of all ranks.

        1 - Var(returns - values) / Var(returns)

    Args:
        values: [batch, time] values of the critic.
        returns: [batch, time] returns.
        response_mask: [batch, time] bool, True on response tokens including EOS.

    Returns:
        Scalar, at most 1. A perfect critic gives 1, a constant one 0. NaN if all returns are equal up to rounding.
    """
    variance = masked_variance(returns, response_mask)
    # Returns are computed from values, so their rounding errors are proportional to the larger of the two.
    scale = torch.where(response_mask, torch.maximum(returns.abs(), values.abs()), 0.0)
    is_rounding = variance <= mean_over_ranks(scale.square(), response_mask) * ROUNDING**2
    residual_variance = masked_variance(returns - values, response_mask)
    return torch.where(is_rounding, torch.nan, 1 - residual_variance / variance)
