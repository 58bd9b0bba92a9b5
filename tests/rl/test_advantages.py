"""Advantages without a critic, by hand. Two prompts with two answers each."""

import math

import torch

from rlhf.rl.advantages import (
    grpo,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
)

NAN = math.nan
MASK = torch.tensor([[False, True, True], [False, True, False], [False, True, True], [False, True, False]])
# whole rewards 1 + 2 = 3 and 7; 0 + 4 = 4 and 2; prompt and padding hold NaN
REWARDS = torch.tensor([[NAN, 1.0, 2.0], [NAN, 7.0, NAN], [NAN, 0.0, 4.0], [NAN, 2.0, NAN]])


def expanded(*values: float) -> torch.Tensor:
    """One value an answer, on its tokens; 0 elsewhere."""
    return torch.where(MASK, torch.tensor(values)[:, None], 0.0)


def test_grpo_compares_with_the_group() -> None:
    """Groups (3, 7): mean 5, deviation with n - 1: sqrt(8); (4, 2): mean 3, sqrt(2). A = (R - mean) / (std + 1e-4)."""
    one, other = 2 / (math.sqrt(8) + 1e-4), 1 / (math.sqrt(2) + 1e-4)
    got = grpo(REWARDS, MASK, group_size=2)
    torch.testing.assert_close(got, expanded(-one, one, other, -other))


def test_grpo_without_scaling_is_the_difference() -> None:
    got = grpo(REWARDS, MASK, group_size=2, scale_by_std=False)
    torch.testing.assert_close(got, expanded(-2.0, 2.0, 1.0, -1.0))


def test_rloo_subtracts_the_others() -> None:
    """With two answers the other one is the baseline: 3 - 7, 7 - 3, 4 - 2, 2 - 4."""
    torch.testing.assert_close(rloo(REWARDS, MASK, group_size=2), expanded(-4.0, 4.0, 2.0, -2.0))


def test_rloo_of_four_answers() -> None:
    """3, 7, 4, 2 in one group: 3 - 13/3, 7 - 9/3, 4 - 12/3, 2 - 14/3."""
    got = rloo(REWARDS, MASK, group_size=4)
    torch.testing.assert_close(got, expanded(-4 / 3, 4.0, 0.0, -8 / 3))


def test_reinforce_pp_whitens_rewards_to_go() -> None:
    """gamma 0.5: to go 1 + 0.5 x 2 = 2, 2 | 7 | 0 + 0.5 x 4 = 2, 4 | 2; mean 19/6, variance over the six tokens."""
    to_go = [2.0, 2.0, 7.0, 2.0, 4.0, 2.0]
    mean = sum(to_go) / 6
    std = math.sqrt(sum((value - mean) ** 2 for value in to_go) / 6)
    got = reinforce_pp(REWARDS, MASK, group_size=1, gamma=0.5)
    torch.testing.assert_close(got[MASK], torch.tensor([(value - mean) / std for value in to_go]))
    assert got[~MASK].eq(0).all()


def test_reinforce_pp_with_the_groups_baseline() -> None:
    """Whole rewards less their group's mean on each token, -2, -2 | 2 | 1, 1 | -1; then whitened over the tokens."""
    centred = [-2.0, -2.0, 2.0, 1.0, 1.0, -1.0]
    mean = sum(centred) / 6
    std = math.sqrt(sum((value - mean) ** 2 for value in centred) / 6)
    got = reinforce_pp_baseline(REWARDS, MASK, group_size=2)
    torch.testing.assert_close(got[MASK], torch.tensor([(value - mean) / std for value in centred]))
