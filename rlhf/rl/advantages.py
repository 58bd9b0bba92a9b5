"""Advantage estimators.

An estimator is a pure function that receives, by name, those of these arguments that its signature declares:

    rewards: [batch, time] reward of each token, including the KL penalty if ``stage.kl.apply_to=reward``.
    response_mask: [batch, time] bool, True on response tokens including EOS.
    values: [batch, time] values of the critic before each token. Declaring it requires a critic: PPO builds one.
    group_size: ``stage.num_generations``. Declaring it requires at least 2. The responses to one prompt are adjacent
        rows: rows 0 to group_size - 1 belong to the first prompt.
    gamma, gae_lambda: ``stage.gamma`` and ``stage.gae_lambda`` (PPO only).

It returns [batch, time] advantages, or, if it uses a critic, advantages and the returns to fit the critic to. Its other
keywords are settings, ``stage.advantage.<keyword>``. A file in ``conf/advantage/`` adds an estimator to the choices of
``advantage=``; without one, use ``advantage=rloo stage.advantage._target_=<module>.<function>``.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.tensors import discounted_cumsum, masked_sum, masked_whiten

AdvantageEstimator: TypeAlias = Callable[..., Tensor | tuple[Tensor, Tensor]]


def gae(
    rewards: Tensor, response_mask: Tensor, *, values: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over the response tokens.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lambda A_{t+1}
        R_t     = A_t + V_t

    The value after the last response token is 0.

    Args:
        rewards: [batch, time] reward of each token.
        response_mask: [batch, time] bool, True on response tokens including EOS.
        values: [batch, time] values of the critic before each token.
        gamma: Discount factor per token.
        gae_lambda: lambda; 0 gives one-step estimates, 1 gives Monte Carlo returns minus values.

    Returns:
        [batch, time] advantages and [batch, time] returns, in reward units; 0 on masked tokens.

    Reference: Schulman et al. 2016, eq. 16 (arXiv:1506.02438).
    """
    rewards, values = torch.where(response_mask, rewards, 0.0), torch.where(response_mask, values, 0.0)
    next_values = F.pad(values[:, 1:], (0, 1))
    advantages = discounted_cumsum(rewards + gamma * next_values - values, response_mask, gamma * gae_lambda)
    return advantages, torch.where(response_mask, advantages + values, 0.0)


def grpo(rewards: Tensor, response_mask: Tensor, *, group_size: int, scale_by_std: bool = True) -> Tensor:
    """Group-relative advantages: the total reward of each response, normalized within its group.

        A_i = (R_i - mean(R)) / (std(R) + 1e-4)

    ``R`` holds the total rewards of the responses to one prompt. All tokens of a response have the same advantage.

    Args:
        rewards: [batch, time] reward of each token.
        response_mask: [batch, time] bool, True on response tokens including EOS.
        group_size: Number of responses per prompt.
        scale_by_std: Divide by the standard deviation of the group, computed with n - 1 as in TRL. Without the
            division, groups of nearly equal rewards are not amplified (Liu et al. 2025, "Dr. GRPO",
            arXiv:2503.20783).

    Returns:
        [batch, time] advantages; 0 on masked tokens.

    Reference: Shao et al. 2024, section 4.1.2 (arXiv:2402.03300).
    """
    groups = _total_rewards(rewards, response_mask, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    if scale_by_std:
        centered = centered / (groups.std(dim=1, keepdim=True) + 1e-4)
    return torch.where(response_mask, centered.reshape(-1, 1), 0.0)


def rloo(rewards: Tensor, response_mask: Tensor, *, group_size: int) -> Tensor:
    """REINFORCE leave-one-out: the total reward of each response minus the mean of the others in its group.

        A_i = R_i - sum_{j != i} R_j / (n - 1) = (R_i - mean(R)) n / (n - 1)

    All tokens of a response have the same advantage.

    Args:
        rewards: [batch, time] reward of each token.
        response_mask: [batch, time] bool, True on response tokens including EOS.
        group_size: n, the number of responses per prompt.

    Returns:
        [batch, time] advantages, in reward units; 0 on masked tokens.

    Reference: Ahmadian et al. 2024, eq. 8 (arXiv:2402.14740); Kool et al. 2019.
    """
    groups = _total_rewards(rewards, response_mask, group_size)
    advantages = (groups - groups.mean(dim=1, keepdim=True)) * (group_size / (group_size - 1))
    return torch.where(response_mask, advantages.reshape(-1, 1), 0.0)


def reinforce_pp(rewards: Tensor, response_mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """REINFORCE++: discounted rewards-to-go, whitened over all response tokens of the rollout.

        G_t = r_t + gamma G_{t+1},    A_t = (G_t - mean(G)) / std(G)

    Args:
        rewards: [batch, time] reward of each token.
        response_mask: [batch, time] bool, True on response tokens including EOS.
        gamma: Discount factor per token.

    Returns:
        [batch, time] advantages, in standard deviations of the rollout; 0 on masked tokens.

    Reference: Hu et al. 2025, "REINFORCE++", eq. 9 to 11 (arXiv:2501.03262).
    """
    return masked_whiten(discounted_cumsum(rewards, response_mask, gamma), response_mask)


def reinforce_pp_baseline(rewards: Tensor, response_mask: Tensor, *, group_size: int) -> Tensor:
    """REINFORCE++-Baseline: total rewards minus their group mean, whitened over all response tokens of the rollout.

        B_i = R_i - mean(R),    A_i = (B_i - mean(B)) / std(B)

    ``mean(R)`` is taken over the responses to one prompt, ``mean(B)`` and ``std(B)`` over the tokens of the rollout.

    Args:
        rewards: [batch, time] reward of each token.
        response_mask: [batch, time] bool, True on response tokens including EOS.
        group_size: Number of responses per prompt.

    Returns:
        [batch, time] advantages, in standard deviations of the rollout; 0 on masked tokens.

    Reference: Hu et al. 2025, "REINFORCE++", the variant for several responses per prompt (arXiv:2501.03262).
    """
    groups = _total_rewards(rewards, response_mask, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    return masked_whiten(torch.where(response_mask, centered.reshape(-1, 1), 0.0), response_mask)


def _total_rewards(rewards: Tensor, response_mask: Tensor, group_size: int) -> Tensor:
    """Return the total reward of each response: [prompts, group_size]."""
    return masked_sum(rewards, response_mask).reshape(-1, group_size)
