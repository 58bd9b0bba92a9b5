"""Preference losses.

A loss is a function, or an ``nn.Module`` if it has a running state. It declares by name what it reads. A loss of pairs
can read:

    chosen, rejected                   [pairs] scores of the two responses, in nats or nats per token (see below)
    beta                               ``stage.beta``
    margins                            [pairs] margins of the data, in reward units; 0 where a record has none
    chosen_lengths, rejected_lengths   [pairs] number of response tokens, EOS included

The score of a response is its log-ratio log pi - log ref, or its log-prob log pi with ``stage.reference_free=true``. It
is summed over the tokens of the response, or averaged with ``stage.length_normalized=true``. A loss that is defined for
only one value of these switches declares it with ``needs``, and the stage rejects the other value.

The settings of a loss are further keywords, which ``conf/loss/<name>.yaml`` fills in. An ``nn.Module`` keeps its state
in buffers, which are saved in checkpoints and restored at resume. It should update them only while ``self.training`` is
True, so that validation does not change them.
"""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = TypeVar("Loss", bound=Callable[..., Any])

MAX_LOGPROB = -1e-6  # upper bound of log p in log-odds, because the odds of p = 1 are infinite


def needs(**switches: bool) -> Callable[[Loss], Loss]:
    """Declare the values of ``reference_free`` and ``length_normalized`` that a loss is defined for.

    The decorated function or ``nn.Module`` class is returned unchanged, with the attribute ``needs``.
    """

    def mark(loss: Loss) -> Loss:
        setattr(loss, "needs", switches)  # noqa: B010 (a plain assignment does not type-check)
        return loss

    return mark


def sigmoid_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """DPO loss: the negative log-likelihood of the labels under the implicit rewards ``beta * (log pi - log ref)``.

        L = -mean_i log sigmoid(beta (chosen_i - rejected_i))

    Args:
        chosen: [pairs] scores of the chosen responses, in nats. Gradients flow through both scores.
        rejected: [pairs] scores of the rejected responses, in nats.
        beta: Strength of the regularization towards the reference model, in reward units per nat.

    Returns:
        Scalar loss, in nats per pair; ln 2 while the policy equals the reference model.

    Reference: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290).
    """
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def ipo_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """IPO loss: the squared distance to a finite target, so that certain labels do not drive the policy without bound.

        L = mean_i (chosen_i - rejected_i - 1 / (2 beta))^2

    The paper sums log-ratios over the response. Some implementations (TRL) average them over its tokens instead, so
    that beta does not depend on the length: ``stage.length_normalized=true``.

    Args:
        chosen: [pairs] scores of the chosen responses, in nats. Gradients flow through both scores.
        rejected: [pairs] scores of the rejected responses, in nats.
        beta: tau of the paper; the target difference is 1 / (2 beta) nats.

    Returns:
        Scalar loss, in nats squared; 1 / (4 beta^2) while the policy equals the reference model.

    Reference: Azar et al. 2023, eq. 17 (arXiv:2310.12036).
    """
    return (chosen - rejected - 1 / (2 * beta)).square().mean()


def hinge_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Hinge loss: pairs whose scores differ by at least 1 / beta have no gradient.

        L = mean_i max(0, 1 - beta (chosen_i - rejected_i))

    Args:
        chosen: [pairs] scores of the chosen responses, in nats. Gradients flow through both scores.
        rejected: [pairs] scores of the rejected responses, in nats.
        beta: Reward units per nat.

    Returns:
        Scalar loss, in reward units; 1 while the policy equals the reference model.

    Reference: Liu et al. 2023, "hinge-norm" (arXiv:2309.06657). Without a reference model, it is the calibration loss
    of Zhao et al. 2023, eq. 1 (SLiC, arXiv:2305.10425).
    """
    return F.relu(1 - beta * (chosen - rejected)).mean()


def conservative_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: Annotated[float, ">= 0", "< 0.5"] = 0.1
) -> Tensor:
    """cDPO loss: the cross-entropy to labels that are correct with probability ``1 - label_smoothing``.

        L = -mean_i [(1 - eps) log sigmoid(m_i) + eps log sigmoid(-m_i)]
        m_i = beta (chosen_i - rejected_i)

    The minimum is at m = ln((1 - eps) / eps); a larger m has a gradient back towards it.

    Args:
        chosen: [pairs] scores of the chosen responses, in nats. Gradients flow through both scores.
        rejected: [pairs] scores of the rejected responses, in nats.
        beta: Strength of the regularization towards the reference model, in reward units per nat.
        label_smoothing: eps, the assumed fraction of wrong labels, in [0, 0.5).

    Returns:
        Scalar loss, in nats per pair; ln 2 while the policy equals the reference model.

    Reference: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO", eq. 3.
    """
    margins = beta * (chosen - rejected)
    return -((1 - label_smoothing) * F.logsigmoid(margins) + label_smoothing * F.logsigmoid(-margins)).mean()


def robust_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: Annotated[float, ">= 0", "< 0.5"] = 0.1
) -> Tensor:
    """rDPO loss: an unbiased estimate of the DPO loss under the true labels, if a known fraction is flipped.

        L = -mean_i [(1 - eps) log sigmoid(m_i) - eps log sigmoid(-m_i)] / (1 - 2 eps)
        m_i = beta (chosen_i - rejected_i)

    Args:
        chosen: [pairs] scores of the chosen responses, in nats. Gradients flow through both scores.
        rejected: [pairs] scores of the rejected responses, in nats.
        beta: Strength of the regularization towards the reference model, in reward units per nat.
        label_smoothing: eps, the fraction of flipped labels, in [0, 0.5).

    Returns:
        Scalar loss, in nats per pair; ln 2 while the policy equals the reference model. It can be negative.

    Reference: Chowdhury et al. 2024, section 3 (arXiv:2403.00409).
    """
    margins = beta * (chosen - rejected)
    as_labeled, as_flipped = -F.logsigmoid(margins), -F.logsigmoid(-margins)
    return (((1 - label_smoothing) * as_labeled - label_smoothing * as_flipped) / (1 - 2 * label_smoothing)).mean()


@needs(reference_free=True, length_normalized=True)
def simpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float, target_margin: Annotated[float, ">= 0"] = 1.0
) -> Tensor:
    """SimPO loss: DPO with the mean log-prob per token as the reward, a target margin and no reference model.

        L = -mean_i log sigmoid(beta (chosen_i - rejected_i) - gamma)

    Args:
        chosen: [pairs] mean log-prob per token of the chosen responses, in nats. Gradients flow through both scores.
        rejected: [pairs] mean log-prob per token of the rejected responses, in nats.
        beta: Reward units per nat per token; 2 to 10 in the paper.
        target_margin: gamma, the target difference of the rewards, in reward units.

    Returns:
        Scalar loss, in nats per pair.

    Reference: Meng et al. 2024, eq. 6 (arXiv:2405.14734).
    """
    return -F.logsigmoid(beta * (chosen - rejected) - target_margin).mean()


@needs(reference_free=True, length_normalized=True)
def odds_ratio_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Odds-ratio term of ORPO, which has no reference model. ``stage.sft_coef=1`` adds the SFT term of the paper.

        L = -beta mean_i log sigmoid(log odds(chosen_i) - log odds(rejected_i)),    odds(s) = e^s / (1 - e^s)

    e^s is the geometric mean of the token probabilities of a response.

    Args:
        chosen: [pairs] mean log-prob per token of the chosen responses, in nats. Gradients flow through both scores.
        rejected: [pairs] mean log-prob per token of the rejected responses, in nats.
        beta: lambda of the paper, the weight of this term relative to the SFT term.

    Returns:
        Scalar loss, in nats per pair times beta.

    Reference: Hong et al. 2024, eq. 6 and 7 (arXiv:2403.07691).
    """
    return -beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected)).mean()


def _log_odds(logprobs: Tensor) -> Tensor:
    logprobs = logprobs.clamp(max=MAX_LOGPROB)
    return logprobs - (-torch.expm1(logprobs)).log()


@needs(reference_free=False)
def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: Annotated[float, ">= 0"] = 1.0,
    undesirable_weight: Annotated[float, ">= 0"] = 1.0,
) -> Tensor:
    """KTO loss: unpaired preferences, where each log-ratio is compared with the KL divergence from the reference model.

        L = mean_i w_i sigmoid(-beta g_i),    g_i = log_ratio_i - kl and w_i = desirable_weight     if desirable,
                                              g_i = kl - log_ratio_i and w_i = undesirable_weight   otherwise

    The sigmoid saturates on both sides, so responses that are far from the baseline have little influence.

    Args:
        log_ratios: [responses] log pi - log ref, in nats. Gradients flow through this argument only.
        desirable: [responses] bool, the label.
        kl: Scalar baseline, an estimate of the KL divergence of the policy from the reference model, in nats, >= 0.
        beta: Strength of the regularization towards the reference model, in reward units per nat.
        desirable_weight: lambda_D. Weight times number of responses should be similar for both labels.
        undesirable_weight: lambda_U.

    Returns:
        Scalar loss; half the mean weight while the policy equals the reference model.

    Reference: Ethayarajh et al. 2024, eq. 8 (arXiv:2402.01306).
    """
    gains = torch.where(desirable, log_ratios - kl, kl - log_ratios)
    losses = torch.sigmoid(-beta * gains)
    return torch.where(desirable, desirable_weight * losses, undesirable_weight * losses).mean()


def response_nll(logprobs: Tensor, lengths: Tensor) -> Tensor:
    """SFT term: the negative log-likelihood of the chosen responses, averaged over their tokens.

        L = -sum_i logprobs_i / sum_i lengths_i

    Args:
        logprobs: [responses] summed log-probs of the responses, in nats. Gradients flow through this argument only.
        lengths: [responses] number of response tokens.

    Returns:
        Scalar loss, in nats per token; 0 if there are no responses.

    Reference: Pang et al. 2024, eq. 1 (arXiv:2404.19733), who average over each response first. Here the mean runs over
    all tokens, as in SFT.
    """
    return -logprobs.sum() / lengths.sum().clamp(min=1)


def response_lengths(response_mask: Tensor) -> Tensor:
    """Number of response tokens of each row, at least 1: [batch, time] bool to [batch]."""
    return response_mask.sum(dim=1).clamp(min=1)
