"""The arithmetic of PPO. Tensors are [batch, time]; entry t speaks of token t, the mask is True on answer tokens."""

import torch
from torch import Tensor

from rlhf.tensors import last_true, masked_mean


# fmt: off
def token_rewards(
    scores: Tensor,              # [batch] what the answer is worth, reward units
    logprobs: Tensor,            # [batch, time] log pi(token) when sampled, nats
    reference_logprobs: Tensor,  # [batch, time] the same under the frozen reference, nats
    mask: Tensor,                # [batch, time] bool
    *,
    kl_coef: float,              # price of leaving the reference; reward units per nat
) -> Tensor:                     # [batch, time] reward units; 0 outside the mask
    """Reward of each token: the price of its log-ratio to the reference, and at the last token the score as well.

    The log-ratio is the estimator k1 of the KL divergence (J. Schulman, "Approximating KL divergence").

    Source: Ziegler et al. 2019, eq. 2 (arXiv:1909.08593); Huang et al. 2024 (arXiv:2403.17031) put the score one place
    later, which gives the same returns for gamma = 1.
    """
    # fmt: on
    rewards = torch.where(mask, -kl_coef * (logprobs - reference_logprobs), 0.0)
    rows = torch.arange(len(scores), device=scores.device)
    return rewards.index_put((rows, last_true(mask)), scores, accumulate=True)


# fmt: off
def gae(
    rewards: Tensor,  # [batch, time] reward units
    values: Tensor,   # [batch, time] critic's estimate before the token, reward units
    mask: Tensor,     # [batch, time] bool
    *,
    gamma: float,       # discount a token
    gae_lambda: float,  # 0: one-step estimates, 1: whole returns
) -> tuple[Tensor, Tensor]:  # advantages and returns, [batch, time] each, reward units; 0 outside the mask
    """Generalized advantage estimation over the answer; the value after its last token is 0.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1},    return_t = A_t + V_t

    Source: Schulman et al. 2016, eq. 16 (arXiv:1506.02438).
    """
    # fmt: on
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    later_advantage = later_value = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * later_value - values[:, t]
        later_advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * later_advantage, 0.0)
        later_value = values[:, t]
        advantages[:, t] = later_advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


# fmt: off
def clipped_policy_loss(
    logprobs: Tensor,      # [batch, time] log pi(token), nats; carries the gradient
    old_logprobs: Tensor,  # [batch, time] log pi(token) when sampled, nats
    advantages: Tensor,    # [batch, time] whitened: standard deviations of reward
    mask: Tensor,          # [batch, time] bool
    *,
    clip_range: float,     # largest rewarded change of the ratio; dimensionless
) -> Tensor:               # []            mean over the True tokens of the batch
    """PPO's clipped surrogate, negated: lower is better.

    A token earns ``ratio * advantage``, where ``ratio = pi / pi_old``. A ratio that has already moved by ``clip_range``
    the way the advantage asks for earns no more and has gradient 0; one that moved the other way pays in full. Tokens
    count alike, so long answers weigh more than short ones.

    Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347).
    """
    # fmt: on
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    advantages = torch.where(mask, advantages, 0.0)
    earned = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    return -masked_mean(earned, mask)


# fmt: off
def clipped_value_loss(
    values: Tensor,      # [batch, time] critic's estimate, reward units; carries the gradient
    old_values: Tensor,  # [batch, time] its estimate when the answers were sampled, reward units
    returns: Tensor,     # [batch, time] what it should say, reward units
    mask: Tensor,        # [batch, time] bool
    *,
    clip_range: float | None,  # largest rewarded change of a value, reward units; None: no clipping
) -> Tensor:             # []            reward units squared
    """Half the squared error of the critic, the worse of the plain and the clipped estimate.

    Source: Huang et al. 2024, detail 14 (arXiv:2403.17031), after the code of Schulman et al. 2017.
    """
    # fmt: on
    values, old_values, returns = (torch.where(mask, part, 0.0) for part in (values, old_values, returns))
    errors = (values - returns).square()
    if clip_range is not None:
        near = old_values + (values - old_values).clamp(-clip_range, clip_range)
        errors = torch.maximum(errors, (near - returns).square())
    return 0.5 * masked_mean(errors, mask)


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """pi / pi_old of each token, 1 outside the mask; masked before exp, so that padding cannot overflow into it."""
    return torch.where(mask, logprobs - old_logprobs, 0.0).exp()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one that knows only the mean. []"""
    left = (returns - values)[mask].var(correction=0)
    return 1 - left / returns[mask].var(correction=0).clamp(min=1e-8)
