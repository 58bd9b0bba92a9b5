"""Preference losses.

Every loss of pairs reads two numbers a pair and has one signature. ``chosen`` and ``rejected`` are what the policy says
of each answer, nats: log pi - log reference, or log pi alone with ``stage.reference_free=true``; summed over the
answer, or the mean a token with ``stage.length_normalized=true``. A loss that is defined for one setting of these
switches only says so by ``needs``, and the stage refuses the other.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = TypeVar("Loss", bound=Callable[..., Tensor])
HIGHEST = -1e-6  # log of the largest probability whose odds are taken; those of probability 1 are infinite


def needs(**switches: bool) -> Callable[[Loss], Loss]:
    """Declare the only setting of the stage's switches that a loss is defined for, as its attribute ``needs``."""

    def mark(loss: Loss) -> Loss:
        vars(loss)["needs"] = switches
        return loss

    return mark


def sigmoid_loss(
    chosen: Tensor,  # [pairs] what the policy says of the better answer, nats; carries the gradient
    rejected: Tensor,  # [pairs] the same of the other answer
    *,
    beta: float,  # strength of the pull to the reference; reward units per nat
) -> Tensor:  # []      nats a pair; ln 2 while the policy is the reference
    """DPO: the negative log-likelihood of the labels under the implicit reward ``beta * (log pi - log reference)``.

    Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290).
    """

    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def ipo_loss(
    chosen: Tensor,  # [pairs] what the policy says of the better answer, nats; carries the gradient
    rejected: Tensor,  # [pairs] the same of the other answer
    *,
    beta: float,  # tau of the paper: the difference aimed at is 1 / (2 beta) nats
) -> Tensor:  # []      nats squared; 1 / (4 beta^2) while the policy is the reference
    """IPO: the squared distance of the difference from the one aimed at, so that sure labels do not push without end.

    As in the paper the log-ratios are of whole answers. Some implementations (TRL) take the mean a token instead, to
    make beta independent of length: ``stage.length_normalized=true``, where beta is 1 / (2 nats a token).

    Source: Azar et al. 2023, eq. 17 (arXiv:2310.12036).
    """

    return (chosen - rejected - 1 / (2 * beta)).square().mean()


def hinge_loss(
    chosen: Tensor,  # [pairs] what the policy says of the better answer, nats; carries the gradient
    rejected: Tensor,  # [pairs] the same of the other answer
    *,
    beta: float,  # reward units per nat: a difference of 1 / beta nats is enough
) -> Tensor:  # []      reward units; 1 while the policy is the reference
    """The support vector machine beside DPO's logistic regression: a pair that is far enough apart pushes no more.

    Source: Zhao et al. 2023, eq. 1 without its regularizer (arXiv:2305.10425, SLiC, which is the reference-free form);
    with the reference: Liu et al. 2023, "hinge-norm" (arXiv:2309.06657).
    """

    return F.relu(1 - beta * (chosen - rejected)).mean()


def conservative_loss(
    chosen: Tensor,  # [pairs] what the policy says of the better answer, nats; carries the gradient
    rejected: Tensor,  # [pairs] the same of the other answer
    *,
    beta: float,  # reward units per nat
    label_smoothing: float,  # share of the labels that are taken to be wrong, from 0 to below 1/2
) -> Tensor:  # []      nats a pair; ln 2 while the policy is the reference
    """cDPO: the cross-entropy to labels that are right with probability ``1 - label_smoothing``.

    It is smallest at a margin of ln((1 - label_smoothing) / label_smoothing) reward units and pulls back beyond it.

    Source: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO", eq. 3.
    """

    margins = beta * (chosen - rejected)
    return -((1 - label_smoothing) * F.logsigmoid(margins) + label_smoothing * F.logsigmoid(-margins)).mean()


def robust_loss(
    chosen: Tensor,  # [pairs] what the policy says of the better answer, nats; carries the gradient
    rejected: Tensor,  # [pairs] the same of the other answer
    *,
    beta: float,  # reward units per nat
    label_smoothing: float,  # share of the labels that are wrong, from 0 to below 1/2
) -> Tensor:  # []      nats a pair; ln 2 while the policy is the reference; may fall below 0
    """rDPO: averaged over labels of which that share is flipped, it is the DPO loss of the true labels.

    Source: Chowdhury et al. 2024, section 3 (arXiv:2403.00409).
    """

    margins = beta * (chosen - rejected)
    as_labelled, as_flipped = -F.logsigmoid(margins), -F.logsigmoid(-margins)
    return (((1 - label_smoothing) * as_labelled - label_smoothing * as_flipped) / (1 - 2 * label_smoothing)).mean()


@needs(reference_free=True, length_normalized=True)
def simpo_loss(
    chosen: Tensor,  # [pairs] mean log pi a token of the better answer, nats; carries the gradient
    rejected: Tensor,  # [pairs] the same of the other answer
    *,
    beta: float,  # reward units per (nat a token); 2 to 10 in the paper
    target_margin: float,  # gamma: by how much the better answer should win, reward units
) -> Tensor:  # []      nats a pair
    """SimPO: DPO with the mean log-prob of a token as the reward, and a margin to win by; no reference.

    Source: Meng et al. 2024, eq. 6 (arXiv:2405.14734).
    """

    return -F.logsigmoid(beta * (chosen - rejected) - target_margin).mean()


@needs(reference_free=True, length_normalized=True)
def odds_ratio_loss(
    chosen: Tensor,  # [pairs] mean log pi a token of the better answer, nats, below 0; carries the gradient
    rejected: Tensor,  # [pairs] the same of the other answer
    *,
    beta: float,  # lambda of the paper: weight of this term beside the SFT term
) -> Tensor:  # []      nats a pair, times beta
    """ORPO's odds-ratio term; its SFT term is ``stage.sft_coef=1``. No reference.

    ``odds = p / (1 - p)`` with p the geometric mean of the token probabilities.

    Source: Hong et al. 2024, eq. 6 and 7 (arXiv:2403.07691).
    """

    return -beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected)).mean()


def _log_odds(logprobs: Tensor) -> Tensor:
    logprobs = logprobs.clamp(max=HIGHEST)
    return logprobs - (-torch.expm1(logprobs)).log()


@needs(reference_free=False)
def kto_loss(
    log_ratios: Tensor,  # [answers] log pi - log reference, nats; carries the gradient
    desirable: Tensor,  # [answers] bool, the label
    kl: Tensor,  # []        distance of policy and reference, nats, 0 or more; no gradient
    *,
    beta: float,  # reward units per nat
    desirable_weight: float = 1.0,  # lambda_D; weight times count of both kinds should be about the same
    undesirable_weight: float = 1.0,  # lambda_U
) -> Tensor:  # []        mean over answers; half the weights while the policy is the reference
    """KTO: labels of single answers. An answer gains or loses value against what the policy says of any answer, ``kl``.

    Value saturates on both sides, so hopeless and settled answers push little.

    Source: Ethayarajh et al. 2024, eq. 8 (arXiv:2402.01306).
    """

    gains = torch.where(desirable, log_ratios - kl, kl - log_ratios)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return (weights * torch.sigmoid(-beta * gains)).mean()


def response_nll(
    logprobs: Tensor,  # [answers] log pi of whole answers, nats; carries the gradient
    lengths: Tensor,  # [answers] tokens
) -> Tensor:  # []        nats a token; 0 for no answers
    """The SFT term: mean negative log-likelihood of the better answers, over their tokens.

    Source: Pang et al. 2024, eq. 1, there normalised answer by answer (arXiv:2404.19733); over tokens as in SFT.
    """

    return -logprobs.sum() / lengths.sum().clamp(min=1)
