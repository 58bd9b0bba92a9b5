"""The arithmetic of learning from one's own answers. Tensors are [batch, time]; entry t speaks of token t, the mask is
True on answer tokens."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.tensors import discounted_cumsum, last_true, masked_mean


def kl_k1(
    logprobs: Tensor,  # [batch, time] log pi(token), nats
    ref_logprobs: Tensor,  # [batch, time] the same under the frozen reference, nats
) -> Tensor:  # [batch, time] nats; unbiased, may be negative
    """The log-ratio: unbiased estimate of KL(pi || reference) from tokens drawn from pi.

    Source: J. Schulman, "Approximating KL divergence".
    """

    return logprobs - ref_logprobs


def kl_k2(
    logprobs: Tensor,  # [batch, time] log pi(token), nats
    ref_logprobs: Tensor,  # [batch, time] the same under the frozen reference, nats
) -> Tensor:  # [batch, time] nats; never negative, biased where the policies are far apart
    """Half the squared log-ratio. Its gradient, unlike k1's, is that of the KL divergence.

    Source: J. Schulman, "Approximating KL divergence".
    """

    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(
    logprobs: Tensor,  # [batch, time] log pi(token), nats
    ref_logprobs: Tensor,  # [batch, time] the same under the frozen reference, nats
) -> Tensor:  # [batch, time] nats; unbiased and never negative
    """``r - 1 - log r`` with ``r = reference / pi``: k1 with a control variate of mean 0.

    Source: J. Schulman, "Approximating KL divergence"; as a loss: Shao et al. 2024, eq. 4 (arXiv:2402.03300).
    """

    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(
    scores: Tensor,  # [batch] what the answer is worth, reward units
    kl: Tensor,  # [batch, time] estimate of the KL to the reference at each token, nats
    response_mask: Tensor,  # [batch, time] bool
    *,
    kl_coef: float,  # price of leaving the reference; reward units per nat
) -> Tensor:  # [batch, time] reward units; 0 outside the mask
    """Reward of each token: the price of its distance to the reference, and at the last token the score as well.

    Source: Ziegler et al. 2019, eq. 2 (arXiv:1909.08593); Huang et al. 2024 (arXiv:2403.17031) put the score one place
    later, after a token that was not sampled; for gamma = lambda = 1 that gives the same advantages.
    """

    rewards = torch.where(response_mask, -kl_coef * kl, 0.0)
    rows = torch.arange(len(scores), device=scores.device)
    return rewards.index_put((rows, last_true(response_mask)), scores, accumulate=True)


def gae(
    rewards: Tensor,  # [batch, time] reward units
    values: Tensor,  # [batch, time] critic's estimate before the token, reward units
    response_mask: Tensor,  # [batch, time] bool
    *,
    gamma: float,  # discount a token
    gae_lambda: float,  # 0: one-step estimates, 1: whole returns
) -> tuple[Tensor, Tensor]:  # advantages and returns, [batch, time] each, reward units; 0 outside the mask
    """Generalized advantage estimation over the answer; the value after its last token is 0.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1},    return_t = A_t + V_t

    Source: Schulman et al. 2016, eq. 16 (arXiv:1506.02438).
    """

    rewards, values = torch.where(response_mask, rewards, 0.0), torch.where(response_mask, values, 0.0)
    later_values = F.pad(values[:, 1:], (0, 1))
    advantages = discounted_cumsum(rewards + gamma * later_values - values, response_mask, gamma * gae_lambda)
    return advantages, torch.where(response_mask, advantages + values, 0.0)


def clipped_policy_loss(
    logprobs: Tensor,  # [batch, time] log pi(token), nats; carries the gradient
    old_logprobs: Tensor,  # [batch, time] log pi(token) when sampled, nats
    advantages: Tensor,  # [batch, time] whitened: standard deviations of reward
    response_mask: Tensor,  # [batch, time] bool
    *,
    clip_range: float,  # largest rewarded change of the ratio; dimensionless
    clip_range_high: float | None = None,  # the same for ratios above 1, where it differs
    dual_clip: float | None = None,  # most that a bad token can cost, in units of its advantage; above 1
    loss_reduction: Callable[[Tensor, Tensor], Tensor] = masked_mean,  # over tokens, or over answers
) -> Tensor:  # []            mean over the True tokens of the batch
    """PPO's clipped surrogate, negated: lower is better.

    A token earns ``ratio * advantage``, where ``ratio = pi / pi_old``. A ratio that has already moved by ``clip_range``
    the way the advantage asks for earns no more and has gradient 0; one that moved the other way pays in full, but
    with ``dual_clip`` no more than ``dual_clip * |advantage|``. Tokens count alike, so long answers weigh more than
    short ones, unless ``average`` is ``sequence_mean``.

    Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347); two ranges: Yu et al. 2025, eq. 10 (arXiv:2503.14476);
    dual clip: Ye et al. 2020, eq. 4 (arXiv:1912.09729).
    """

    ratio = policy_ratio(logprobs, old_logprobs, response_mask)
    advantages = torch.where(response_mask, advantages, 0.0)
    high = clip_range if clip_range_high is None else clip_range_high
    earned = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + high) * advantages)
    if dual_clip is not None:
        earned = torch.where(advantages < 0, torch.maximum(earned, dual_clip * advantages), earned)
    return -loss_reduction(earned, response_mask)


def clipped_value_loss(
    values: Tensor,  # [batch, time] critic's estimate, reward units; carries the gradient
    old_values: Tensor,  # [batch, time] its estimate when the answers were sampled, reward units
    returns: Tensor,  # [batch, time] what it should say, reward units
    response_mask: Tensor,  # [batch, time] bool
    *,
    clip_range: float | None,  # largest rewarded change of a value, reward units; None: no clipping
    loss_reduction: Callable[[Tensor, Tensor], Tensor] = masked_mean,  # over tokens, or over answers
) -> Tensor:  # []            reward units squared
    """Half the squared error of the critic, the worse of the plain and the clipped estimate.

    Source: Huang et al. 2024, detail 14 (arXiv:2403.17031), after the code of Schulman et al. 2017.
    """

    values, old_values, returns = (torch.where(response_mask, part, 0.0) for part in (values, old_values, returns))
    errors = (values - returns).square()
    if clip_range is not None:
        near = old_values + (values - old_values).clamp(-clip_range, clip_range)
        errors = torch.maximum(errors, (near - returns).square())
    return 0.5 * loss_reduction(errors, response_mask)


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """pi / pi_old of each token, 1 outside the mask; masked before exp, so that padding cannot overflow into it."""
    return torch.where(response_mask, logprobs - old_logprobs, 0.0).exp()


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one that knows only the mean. []"""
    left = (returns - values)[response_mask].var(correction=0)
    return 1 - left / returns[response_mask].var(correction=0).clamp(min=1e-8)
