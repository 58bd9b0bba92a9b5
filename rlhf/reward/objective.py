"""Losses of reward models. Scores are in reward units: a difference of 1 is odds of e to 1."""

import torch.nn.functional as F
from torch import Tensor


# fmt: off
def bradley_terry_loss(
    chosen: Tensor,    # [pairs] score of the better answer, reward units; carries the gradient
    rejected: Tensor,  # [pairs] score of the other one, reward units; carries the gradient
    margin: Tensor,    # [pairs] by how much it should be better, reward units; 0 where the data does not say
) -> Tensor:           # []      nats a pair; ln 2 where both scores are equal and the margin is 0
    """Negative log-likelihood of the labels if P(chosen over rejected) = sigmoid(chosen - rejected - margin).

    Source: Stiennon et al. 2020, section 3.4 (arXiv:2009.01325); margin: Touvron et al. 2023, eq. 2 (arXiv:2307.09288).
    """
    # fmt: on
    return -F.logsigmoid(chosen - rejected - margin).mean()


# fmt: off
def regression_loss(
    scores: Tensor,   # [batch] reward units; carries the gradient
    rewards: Tensor,  # [batch] what the answers are worth according to the data, reward units
) -> Tensor:          # []      reward units squared
    """Mean squared error of the scores."""
    # fmt: on
    return F.mse_loss(scores, rewards)
