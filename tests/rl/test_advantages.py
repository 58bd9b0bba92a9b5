"""Advantage estimators by hand, for two prompts with two responses each. GAE is tested in test_objective.py."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.rl.advantages import dr_grpo, grpo, reinforce_pp, reinforce_pp_baseline, rloo

NAN = math.nan
MASK = torch.tensor([[False, True, True], [False, True, False], [False, True, True], [False, True, False]])
# Total rewards: 1 + 2 = 3 and 7; 0 + 4 = 4 and 2. Prompt and padding are NaN.
REWARDS = torch.tensor([[NAN, 1.0, 2.0], [NAN, 7.0, NAN], [NAN, 0.0, 4.0], [NAN, 2.0, NAN]])
SCORES = torch.tensor([3.0, 7.0, 4.0, 2.0])
NO_PENALTY = torch.zeros(4, 3)
# KL penalties of later tokens included: 0.5, 0.2 | 0.1 | 0, -0.3 | 0.
PENALTY = torch.tensor([[NAN, 0.3, 0.2], [NAN, 0.1, NAN], [NAN, 0.3, -0.3], [NAN, 0.0, NAN]])
PENALTY_TO_GO = torch.tensor([[0.0, 0.5, 0.2], [0.0, 0.1, 0.0], [0.0, 0.0, -0.3], [0.0, 0.0, 0.0]])


def expanded(*values: float) -> torch.Tensor:
    """Return one value per response on all of its tokens, and 0 elsewhere."""
    return torch.where(MASK, torch.tensor(values)[:, None], 0.0)


def test_grpo_by_hand() -> None:
    """A = (s - mean) / (std + 1e-4). Group (3, 7): mean 5, std sqrt(8). Group (4, 2): mean 3, std sqrt(2)."""
    first, second = 2 / (math.sqrt(8) + 1e-4), 1 / (math.sqrt(2) + 1e-4)
    advantages = grpo(SCORES, MASK, kl_penalty=NO_PENALTY, group_size=2)
    torch.testing.assert_close(advantages, expanded(-first, first, second, -second))


@pytest.mark.parametrize("score", [10.1, 100.1, 1000.1])
@pytest.mark.parametrize("size", [10, 12, 16])
def test_groups_of_equal_scores_have_no_advantage(score: float, size: int) -> None:
    """The mean of equal float32 numbers can differ from them by rounding, which the division would amplify."""
    scores, mask = torch.full((size,), score), torch.ones(size, 2, dtype=torch.bool)
    assert grpo(scores, mask, kl_penalty=torch.zeros(size, 2), group_size=size).eq(0).all()


def test_grpo_without_scaling_and_dr_grpo_are_the_distance_from_the_group_mean() -> None:
    expected = expanded(-2.0, 2.0, 1.0, -1.0)
    unscaled = grpo(SCORES, MASK, kl_penalty=NO_PENALTY, group_size=2, scale_by_std=False)
    torch.testing.assert_close(unscaled, expected)
    torch.testing.assert_close(dr_grpo(SCORES, MASK, kl_penalty=NO_PENALTY, group_size=2), expected)


@pytest.mark.parametrize("estimator", [grpo, dr_grpo])
def test_the_kl_penalty_is_subtracted_after_the_group_normalization(estimator: Callable[..., Tensor]) -> None:
    """At each token, the penalty of this and all later tokens is subtracted from the normalized score."""
    without = estimator(SCORES, MASK, kl_penalty=NO_PENALTY, group_size=2)
    with_penalty = estimator(SCORES, MASK, kl_penalty=PENALTY, group_size=2)
    torch.testing.assert_close(with_penalty, without - PENALTY_TO_GO)


@pytest.mark.parametrize("estimator", [grpo, dr_grpo])
def test_equal_scores_do_not_amplify_the_noise_of_the_kl(estimator: Callable[..., Tensor]) -> None:
    """Every response to a prompt has score 1: its advantages are minus its own small penalty, not of unit size."""
    advantages = estimator(torch.ones(4), MASK, kl_penalty=PENALTY, group_size=2)
    torch.testing.assert_close(advantages, -PENALTY_TO_GO)
    assert estimator(torch.ones(4), MASK, kl_penalty=NO_PENALTY, group_size=2).eq(0).all()


def test_rloo_of_two_responses_by_hand() -> None:
    """The baseline of each response is the other one: 3 - 7, 7 - 3, 4 - 2, 2 - 4."""
    torch.testing.assert_close(rloo(REWARDS, MASK, group_size=2), expanded(-4.0, 4.0, 2.0, -2.0))


def test_rloo_of_four_responses_by_hand() -> None:
    """3, 7, 4, 2 in one group: 3 - 13/3, 7 - 9/3, 4 - 12/3, 2 - 14/3."""
    advantages = rloo(REWARDS, MASK, group_size=4)
    torch.testing.assert_close(advantages, expanded(-4 / 3, 4.0, 0.0, -8 / 3))


def test_reinforce_pp_by_hand() -> None:
    """gamma 0.5. Rewards-to-go 1 + 0.5 x 2 = 2, 2 | 7 | 0 + 0.5 x 4 = 2, 4 | 2; mean 19/6, variance over 6 tokens."""
    to_go = [2.0, 2.0, 7.0, 2.0, 4.0, 2.0]
    mean = sum(to_go) / 6
    std = math.sqrt(sum((value - mean) ** 2 for value in to_go) / 6)
    advantages = reinforce_pp(REWARDS, MASK, gamma=0.5)
    torch.testing.assert_close(advantages[MASK], torch.tensor([(value - mean) / std for value in to_go]))
    assert advantages[~MASK].eq(0).all()


def test_reinforce_pp_baseline_by_hand() -> None:
    """Score minus group mean minus penalty-to-go: -2.5, -2.2 | 1.9 | 1, 1.3 | -1; then whitened over the 6 tokens."""
    centered = [-2.5, -2.2, 1.9, 1.0, 1.3, -1.0]
    mean = sum(centered) / 6
    std = math.sqrt(sum((value - mean) ** 2 for value in centered) / 6)
    advantages = reinforce_pp_baseline(SCORES, MASK, kl_penalty=PENALTY, group_size=2)
    torch.testing.assert_close(advantages[MASK], torch.tensor([(value - mean) / std for value in centered]))
