"""Losses and metrics of reward models.

Scores are in reward units. A difference of 1 between two responses means odds of e to 1.
"""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Bradley-Terry loss: negative log-likelihood of the preferences.

        L = -mean_i [(1 - e) log sigmoid(z_i) + e log sigmoid(-z_i)],    z_i = chosen_i - rejected_i - margin_i
          =  mean_i [e z_i - log sigmoid(z_i)]

    With label smoothing e, a pair has its lowest loss at sigmoid(z) = 1 - e, so that larger differences are penalized.

    Args:
        chosen: [pairs] or [pairs, heads] scores of the chosen responses, in reward units. Receives gradients.
        rejected: [same shape] scores of the rejected responses, in reward units. Receives gradients.
        margin: [pairs] or [pairs, 1] by how much the chosen response should be better, in reward units; 0 if unknown.
        label_smoothing: e, probability that a label is wrong, at least 0 and below 0.5.

    Returns:
        Scalar mean over pairs and heads, in nats per pair; ln 2 for equal scores without a margin.

    Reference: Stiennon et al. 2020, section 3.4 (arXiv:2009.01325). Margin: Touvron et al. 2023, eq. 2
    (arXiv:2307.09288). Label smoothing: Wang et al. 2024, Secrets of RLHF part II (arXiv:2401.06080).
    """
    difference = chosen - rejected - margin
    return (label_smoothing * difference - F.logsigmoid(difference)).mean()


def centering_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Centering penalty: keeps scores around 0, because preferences do not determine their offset.

        P = mean_i (chosen_i + rejected_i)^2

    Args:
        chosen: [pairs] or [pairs, heads] scores of the chosen responses, in reward units. Receives gradients.
        rejected: [same shape] scores of the rejected responses, in reward units. Receives gradients.

    Returns:
        Scalar mean over pairs and heads, in squared reward units.

    Reference: Eisenstein et al. 2023 (arXiv:2312.09244). TRL calls its weight ``center_rewards_coefficient``.
    """
    return (chosen + rejected).square().mean()


def regression_loss(scores: Tensor, rewards: Tensor) -> Tensor:
    """Mean squared error between scores and rewards.

    Args:
        scores: [batch] or [batch, heads] scores, in reward units. Receives gradients.
        rewards: [same shape] rewards of the data, in reward units.

    Returns:
        Scalar, in squared reward units.
    """
    return F.mse_loss(scores, rewards)


def ensemble_std(scores: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Disagreement of an ensemble: standard deviation over the heads, averaged over the responses.

    The mean of each head is subtracted first, because preferences do not determine the offset of a head.

    Args:
        scores: [batch, heads] scores, in reward units.
        offsets: [heads] mean score of each head over the batches of all ranks; None: over these scores.

    Returns:
        Scalar, in reward units.
    """
    offsets = scores.mean(dim=0) if offsets is None else offsets
    return (scores - offsets).std(dim=1, correction=0).mean()
