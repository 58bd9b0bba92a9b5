"""Losses of reward models. Scores are in reward units: a difference of 1 is odds of e to 1."""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen: Tensor,  # [pairs] or [pairs, heads] score of the better answer, reward units; carries the gradient
    rejected: Tensor,  # [the same]                score of the other one, reward units; carries the gradient
    margin: Tensor,  # [pairs] or [pairs, 1]     by how much it should be better, reward units; 0 where not said
    *,
    label_smoothing: float = 0.0,  # probability that a label is the wrong way round, from 0 to below 1/2
) -> Tensor:  # []      nats a pair, mean over pairs and heads; ln 2 at equal scores without a margin
    """Negative log-likelihood of the labels if P(chosen over rejected) = sigmoid(chosen - rejected - margin).

    With the lead ``z = chosen - rejected - margin`` and smoothing ``e`` a pair costs

        -(1 - e) log sigmoid(z) - e log sigmoid(-z)  =  -log sigmoid(z) + e z,

    lowest at ``sigmoid(z) = 1 - e``: beyond that more certainty costs instead of paying.

    Source: Stiennon et al. 2020, section 3.4 (arXiv:2009.01325); margin: Touvron et al. 2023, eq. 2 (arXiv:2307.09288);
    smoothing: Wang et al. 2024, "Secrets of RLHF II" (arXiv:2401.06080); as in Mitchell's conservative DPO, 2023.
    """

    lead = chosen - rejected - margin
    return (label_smoothing * lead - F.logsigmoid(lead)).mean()


def centering_penalty(
    chosen: Tensor,  # [pairs] or [pairs, heads] score of the better answer, reward units; carries the gradient
    rejected: Tensor,  # [the same]                score of the other one, reward units; carries the gradient
) -> Tensor:  # []      reward units squared, mean over pairs and heads
    """Mean squared sum of a pair's scores: holds the zero of the scores, which preferences alone leave free.

    Source: Eisenstein et al. 2023 (arXiv:2312.09244); as ``center_rewards_coefficient`` of TRL.
    """

    return (chosen + rejected).square().mean()


def regression_loss(
    scores: Tensor,  # [batch] reward units; carries the gradient
    rewards: Tensor,  # [batch] what the answers are worth according to the data, reward units
) -> Tensor:  # []      reward units squared
    """Mean squared error of the scores."""

    return F.mse_loss(scores, rewards)


def ensemble_std(
    scores: Tensor,  # [batch, heads] reward units
) -> Tensor:  # []             reward units
    """How much the heads disagree: their standard deviation about an answer, mean over the answers.

    Each head's own mean over the batch is taken off first: preferences leave its zero free.
    """

    return (scores - scores.mean(dim=0)).std(dim=1, correction=0).mean()
