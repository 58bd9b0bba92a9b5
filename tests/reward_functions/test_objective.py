"""Scores of ensembles, by hand."""

import torch

from rlhf.reward_functions import pessimistic_score


def test_pessimistic_score_by_hand() -> None:
    """Three scorers, penalty 0.5, population standard deviation.

    scores     mean  deviations  variance        std      mean - 0.5 std
    0, 3, 6      3   -3, 0, 3    18 / 3 = 6    sqrt(6)      3 - 0.5 sqrt(6) = 1.7753
    2, 2, 2      2    0, 0, 0        0            0         2
    With a single scorer the standard deviation is 0. Penalty 0 gives the mean.
    """
    scores = torch.tensor([[0.0, 3.0, 6.0], [2.0, 2.0, 2.0]])
    torch.testing.assert_close(
        pessimistic_score(scores, uncertainty_penalty=0.5), torch.tensor([3 - 0.5 * 6**0.5, 2.0])
    )
    torch.testing.assert_close(pessimistic_score(scores, uncertainty_penalty=0.0), torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(pessimistic_score(scores[:, 2:], uncertainty_penalty=9.0), torch.tensor([6.0, 2.0]))
