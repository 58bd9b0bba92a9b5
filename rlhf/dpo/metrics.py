"""Metrics of the preference stage; ``docs/metrics.md`` explains each of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.data import PairBatch, UnpairedBatch
from rlhf.tensors import masked_mean


class MetricGroup(NamedTuple):
    """Metrics that are means over the same terms.

    Args:
        terms: Number of terms in this batch. It is the weight of the batch in the mean over a validation epoch. A group
            without terms on any rank is not logged.
        values: The metrics by name.
    """

    terms: int
    values: dict[str, Tensor]


@torch.no_grad()
def pair_metrics(
    batch: PairBatch, scores: Tensor, logprobs: Tensor, entropy: Tensor, *, beta: float
) -> list[MetricGroup]:
    """Metrics of a batch of preference pairs.

    Args:
        batch: Preference pairs.
        scores: [2 x pairs] log-ratios or log-probs as the loss reads them, in nats or nats per token.
        logprobs: [2 x pairs] summed log-probs under the policy, in nats.
        entropy: Scalar mean entropy per response token, in nats.
        beta: Reward units per nat.
    """
    chosen, rejected = (beta * half for half in batch.halves(scores))
    chosen_logprobs, rejected_logprobs = batch.halves(logprobs)
    metrics = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": chosen_logprobs.mean(),
        "logps/rejected": rejected_logprobs.mean(),
    }
    return [MetricGroup(batch.loss_terms, metrics), MetricGroup(batch.sequences.loss_terms, {"entropy": entropy})]


@torch.no_grad()
def unpaired_metrics(
    batch: UnpairedBatch, scores: Tensor, logprobs: Tensor, entropy: Tensor, kl: Tensor, *, beta: float
) -> list[MetricGroup]:
    """Metrics of a batch of unpaired preferences.

    ``rewards/accuracies`` is the fraction of responses whose reward is above the KL baseline if and only if they are
    desirable.

    Args:
        batch: Unpaired preferences.
        scores: [batch] log-ratios as the loss reads them, in nats or nats per token.
        logprobs: [batch] summed log-probs under the policy, in nats.
        entropy: Scalar mean entropy per response token, in nats.
        kl: Scalar KL baseline, in the unit of ``scores``.
        beta: Reward units per nat.
    """
    desirable, rewards = batch.desirable, beta * scores
    correct = (rewards > beta * kl) == desirable
    groups = [
        MetricGroup(batch.sequences.loss_terms, {"entropy": entropy}),
        MetricGroup(batch.loss_terms, {"rewards/accuracies": correct.float().mean(), "kto/kl": kl}),
    ]
    desirable_rows = batch.desirable_rows or 0
    undesirable_rows = len(desirable) - desirable_rows
    for name, mask, rows in (("chosen", desirable, desirable_rows), ("rejected", ~desirable, undesirable_rows)):
        means = {f"rewards/{name}": masked_mean(rewards, mask), f"logps/{name}": masked_mean(logprobs, mask)}
        groups.append(MetricGroup(rows, means))
    return groups
