"""Advantages without a critic. Answers to one prompt stand together: rows 0..n-1, n..2n-1, ..."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.tensors import discounted_cumsum, masked_sum, masked_whiten

F = TypeVar("F", bound=Callable[..., Tensor])


def compares_answers(function: F) -> F:
    """Mark an estimator that compares the answers to a prompt, so that one answer is not enough."""
    function.smallest_group = 2  # type: ignore[attr-defined]
    return function


@compares_answers
def grpo(
    rewards: Tensor,  # [batch, time] reward of each token, reward units
    response_mask: Tensor,  # [batch, time] bool
    *,
    group_size: int,  # answers to a prompt
    scale_by_std: bool = True,  # divide by the standard deviation of the group
) -> Tensor:  # [batch, time] standard deviations of the group, or reward units; 0 outside the mask
    """Each answer's whole reward, compared with the group it belongs to; every token of an answer gets the same.

        A = (R - mean of group) / (standard deviation of group + 1e-4)

    Without the division, groups that all but agree weigh no more than others (Liu et al. 2025, "Dr. GRPO",
    arXiv:2503.20783).

    Source: Shao et al. 2024, section 4.1.2 (arXiv:2402.03300); n - 1 in the deviation, as in TRL.
    """

    groups = _by_group(rewards, response_mask, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale_by_std:
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-4)
    return torch.where(response_mask, centred.reshape(-1, 1), 0.0)


@compares_answers
def rloo(
    rewards: Tensor,  # [batch, time] reward of each token, reward units
    response_mask: Tensor,  # [batch, time] bool
    *,
    group_size: int,  # answers to a prompt
) -> Tensor:  # [batch, time] reward units; 0 outside the mask
    """REINFORCE leave-one-out: each answer's whole reward less the mean of the other answers to its prompt.

        A_i = R_i - (sum of the others) / (n - 1) = (R_i - mean of group) n / (n - 1)

    Source: Ahmadian et al. 2024, eq. 8 (arXiv:2402.14740); Kool et al. 2019.
    """

    groups = _by_group(rewards, response_mask, group_size)
    advantages = (groups - groups.mean(dim=1, keepdim=True)) * (group_size / (group_size - 1))
    return torch.where(response_mask, advantages.reshape(-1, 1), 0.0)


def reinforce_pp(
    rewards: Tensor,  # [batch, time] reward of each token, reward units
    response_mask: Tensor,  # [batch, time] bool
    *,
    group_size: int,  # answers to a prompt; they are not compared
    gamma: float = 1.0,  # discount a token
) -> Tensor:  # [batch, time] standard deviations of the batch; 0 outside the mask
    """REINFORCE++: rewards to go of each token, whitened over the tokens of the whole batch.

        A_t = r_t + gamma A_{t+1},    then (A - mean) / standard deviation

    Source: Hu et al. 2025, "REINFORCE++", eq. 9 to 11 (arXiv:2501.03262).
    """

    return masked_whiten(discounted_cumsum(rewards, response_mask, gamma), response_mask)


@compares_answers
def reinforce_pp_baseline(
    rewards: Tensor,  # [batch, time] reward of each token, reward units
    response_mask: Tensor,  # [batch, time] bool
    *,
    group_size: int,  # answers to a prompt
) -> Tensor:  # [batch, time] standard deviations of the batch; 0 outside the mask
    """REINFORCE++-Baseline: each answer's whole reward less its group's mean, whitened over the tokens of the batch.

    Source: Hu et al. 2025, "REINFORCE++" (arXiv:2501.03262), the variant for several answers to a prompt.
    """

    groups = _by_group(rewards, response_mask, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return masked_whiten(torch.where(response_mask, centred.reshape(-1, 1), 0.0), response_mask)


def _by_group(rewards: Tensor, response_mask: Tensor, group_size: int) -> Tensor:
    """Whole reward of each answer, [prompts, group_size]."""
    return masked_sum(rewards, response_mask).reshape(-1, group_size)
