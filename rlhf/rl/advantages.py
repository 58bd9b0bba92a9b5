"""Advantage estimators.

An estimator is a pure function that receives, by name, those of these arguments that its signature declares:

    rewards: [batch, time] reward of each token: the score at the last response token, minus the KL penalty if
        ``stage.kl.apply_to=reward``.
    scores: [batch] score of each response, shaped by ``stage.scores``, without any KL penalty.
    kl_penalty: [batch, time] KL coefficient times KL at each token, in reward units; 0 with ``stage.kl.apply_to=loss``.
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
from typing import Annotated, TypeAlias

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


def grpo(
    scores: Tensor, response_mask: Tensor, *, kl_penalty: Tensor, group_size: int, scale_by_std: bool = True
) -> Tensor:
    """Group-relative advantages: the score of each response, normalized within its group.

        A_it = (s_i - mean(s)) / (std(s) + 1e-4) - sum_{t' >= t} p_it'

    ``s`` holds the scores of the responses to one prompt, and ``p`` is the KL penalty, which is 0 in the published
    method: it has the KL in the loss. With ``stage.kl.apply_to=reward``, the penalty is subtracted after the
    normalization. If it were part of the normalized rewards, a group of equal scores would amplify the noise of its KL
    to unit size.

    Args:
        scores: [batch] score of each response.
        response_mask: [batch, time] bool, True on response tokens including EOS.
        kl_penalty: [batch, time] KL penalty at each token.
        group_size: Number of responses per prompt.
        scale_by_std: Divide by the standard deviation of the group, computed with n - 1 as in TRL.

    Returns:
        [batch, time] advantages; 0 on masked tokens.

    Reference: Shao et al. 2024, section 4.1.2 (arXiv:2402.03300).
    """
    centered = _centered(scores, group_size)
    if scale_by_std:
        centered = centered / (centered.std(dim=1, keepdim=True) + 1e-4)
    return _minus_penalty_to_go(centered, response_mask, kl_penalty)


def dr_grpo(scores: Tensor, response_mask: Tensor, *, kl_penalty: Tensor, group_size: int) -> Tensor:
    """Group-relative advantages of Dr. GRPO: the score of each response minus the mean of its group.

        A_it = s_i - mean(s) - sum_{t' >= t} p_it'

    Without the division by the standard deviation, groups of nearly equal scores are not amplified. The published
    method also replaces the length of each response in the loss by a constant (``stage.loss_reduction=sequence_sum``),
    and it has no KL penalty at all (``stage.kl_coef=0``), because it is trained on verifiable rewards.

    Args:
        scores: [batch] score of each response.
        response_mask: [batch, time] bool, True on response tokens including EOS.
        kl_penalty: [batch, time] KL penalty at each token.
        group_size: Number of responses per prompt.

    Returns:
        [batch, time] advantages, in reward units; 0 on masked tokens.

    Reference: Liu et al. 2025, "Dr. GRPO", section 3.2 (arXiv:2503.20783).
    """
    return grpo(scores, response_mask, kl_penalty=kl_penalty, group_size=group_size, scale_by_std=False)


def rloo(rewards: Tensor, response_mask: Tensor, *, group_size: int) -> Tensor:
    """REINFORCE leave-one-out: the total reward of each response minus the mean of the others in its group.

        A_i = R_i - sum_{j != i} R_j / (n - 1) = (R_i - mean(R)) n / (n - 1)

    ``R`` is the score minus the KL penalty of the whole response. All tokens of a response have the same advantage.

    Args:
        rewards: [batch, time] reward of each token.
        response_mask: [batch, time] bool, True on response tokens including EOS.
        group_size: n, the number of responses per prompt.

    Returns:
        [batch, time] advantages, in reward units; 0 on masked tokens.

    Reference: Ahmadian et al. 2024, eq. 8 (arXiv:2402.14740); Kool et al. 2019.
    """
    advantages = _centered(masked_sum(rewards, response_mask), group_size) * (group_size / (group_size - 1))
    return torch.where(response_mask, advantages.reshape(-1, 1), 0.0)


def reinforce_pp(rewards: Tensor, response_mask: Tensor, *, gamma: Annotated[float, ">= 0", "<= 1"] = 1.0) -> Tensor:
    """REINFORCE++: discounted rewards-to-go, whitened over all response tokens of the rollout, on all devices.

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


def reinforce_pp_baseline(scores: Tensor, response_mask: Tensor, *, kl_penalty: Tensor, group_size: int) -> Tensor:
    """REINFORCE++-Baseline: scores minus their group mean, whitened over all response tokens of the rollout.

        B_it = s_i - mean(s) - sum_{t' >= t} p_it',    A_it = (B_it - mean(B)) / std(B)

    ``mean(s)`` is taken over the responses to one prompt, ``mean(B)`` and ``std(B)`` over the tokens of the rollout on
    all devices. The KL penalty ``p`` is 0 in the published method, which has the KL in the loss.

    Args:
        scores: [batch] score of each response.
        response_mask: [batch, time] bool, True on response tokens including EOS.
        kl_penalty: [batch, time] KL penalty at each token.
        group_size: Number of responses per prompt.

    Returns:
        [batch, time] advantages, in standard deviations of the rollout; 0 on masked tokens.

    Reference: Hu et al. 2025, "REINFORCE++", the variant with a baseline (arXiv:2501.03262).
    """
    centered = _centered(scores, group_size)
    return masked_whiten(_minus_penalty_to_go(centered, response_mask, kl_penalty), response_mask)


def _centered(values: Tensor, group_size: int) -> Tensor:
    """Subtract from values their mean in each group: [batch] to [prompts, group_size].

    Equal values give exact zeros, which division by a small standard deviation does not turn into a signal.
    """
    groups = values.reshape(-1, group_size)
    shifted = groups - groups[:, :1]
    return shifted - shifted.mean(dim=1, keepdim=True)


def _minus_penalty_to_go(values: Tensor, response_mask: Tensor, kl_penalty: Tensor) -> Tensor:
    """Subtract from the value of a response, at each of its tokens, the KL penalty of this and all later tokens.

    Args:
        values: [prompts, group_size] value of each response.
        response_mask: [batch, time] bool, True on response tokens including EOS.
        kl_penalty: [batch, time] KL penalty at each token.

    Returns:
        [batch, time]; 0 on masked tokens.
    """
    to_go = discounted_cumsum(kl_penalty, response_mask, 1.0)
    return torch.where(response_mask, values.reshape(-1, 1) - to_go, 0.0)
