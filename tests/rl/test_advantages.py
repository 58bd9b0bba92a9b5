"""Advantage estimators by hand, for two prompts with two responses each. GAE is tested in test_objective.py."""

import math

import torch

from rlhf.rl.advantages import grpo, reinforce_pp, reinforce_pp_baseline, rloo

NAN = math.nan
MASK = torch.tensor([[False, True, True], [False, True, False], [False, True, True], [False, True, False]])
# Total rewards: 1 + 2 = 3 and 7; 0 + 4 = 4 and 2. Prompt and padding are NaN.
REWARDS = torch.tensor([[NAN, 1.0, 2.0], [NAN, 7.0, NAN], [NAN, 0.0, 4.0], [NAN, 2.0, NAN]])


def expanded(*values: float) -> torch.Tensor:
    """Return one value per response on all of its tokens, and 0 elsewhere."""
    return torch.where(MASK, torch.tensor(values)[:, None], 0.0)


def test_grpo_by_hand() -> None:
    """A = (R - mean) / (std + 1e-4). Group (3, 7): mean 5, std sqrt(8). Group (4, 2): mean 3, std sqrt(2)."""
    first, second = 2 / (math.sqrt(8) + 1e-4), 1 / (math.sqrt(2) + 1e-4)
    advantages = grpo(REWARDS, MASK, group_size=2)
    torch.testing.assert_close(advantages, expanded(-first, first, second, -second))


def test_grpo_without_scaling_is_the_distance_from_the_group_mean() -> None:
    advantages = grpo(REWARDS, MASK, group_size=2, scale_by_std=False)
    torch.testing.assert_close(advantages, expanded(-2.0, 2.0, 1.0, -1.0))


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
    """Total reward minus group mean on each token: -2, -2 | 2 | 1, 1 | -1; then whitened over the 6 tokens."""
    centered = [-2.0, -2.0, 2.0, 1.0, 1.0, -1.0]
    mean = sum(centered) / 6
    std = math.sqrt(sum((value - mean) ** 2 for value in centered) / 6)
    advantages = reinforce_pp_baseline(REWARDS, MASK, group_size=2)
    torch.testing.assert_close(advantages[MASK], torch.tensor([(value - mean) / std for value in centered]))
