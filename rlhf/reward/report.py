"""Report on a trained reward model: accuracy, calibration and length bias on held-out data. Arithmetic only.

A report is a dictionary that can be written as JSON. Its values are numbers, dictionaries of numbers, and lists of
buckets. A bucket holds rows with similar values: ``low`` and ``high`` are its bounds, ``count`` is its number of rows,
and its other entries are means over the rows. A number that is undefined is None.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor

Bucket: TypeAlias = dict[str, float]

BUCKETS = 5  # Number of buckets of lengths, rewards and standard deviations.
CALIBRATION_BUCKETS = 10  # Number of buckets of the calibration curve.


def pair_report(chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> dict[str, Any]:
    """Evaluate a reward model on preference pairs. The score of a response is the mean over the heads.

    ``by_confidence`` is the calibration curve: the accuracy as a function of the confidence, which is the sigmoid of
    the absolute difference of the scores. ``calibration_error`` is its expected calibration error over buckets of equal
    counts. Labels are taken as they are: if one in ten is wrong, a calibrated model has a confidence of at most 0.9.

    Args:
        chosen: [pairs, heads] scores of the chosen responses, in reward units.
        rejected: [pairs, heads] scores of the rejected responses, in reward units.
        chosen_lengths: [pairs] tokens of the chosen responses.
        rejected_lengths: [pairs] tokens of the rejected responses.

    Reference: Guo et al. 2017, eq. 3 (arXiv:1706.04599).
    """
    difference, length_difference = (chosen - rejected).mean(dim=1), chosen_lengths - rejected_lengths
    scores, lengths = torch.cat([chosen, rejected]), torch.cat([chosen_lengths, rejected_lengths])
    correct, confidence = difference > 0, difference.abs().sigmoid()
    ensemble_std = (chosen - rejected).std(dim=1, correction=0)
    curve = bucketed(confidence, CALIBRATION_BUCKETS, confidence=confidence, accuracy=correct)
    longer, shorter = length_difference > 0, length_difference < 0
    return {
        "kind": "pairs",
        "count": len(difference),
        "heads": chosen.shape[1],
        "accuracy": _mean(correct),
        "margin": _mean(difference),
        "ensemble_std": _mean(scores.std(dim=1, correction=0)),
        "calibration_error": calibration_error(curve),
        "longer_chosen": {"count": int(longer.sum()), "accuracy": _mean(correct[longer])},
        "shorter_chosen": {"count": int(shorter.sum()), "accuracy": _mean(correct[shorter])},
        "length_correlation": correlations(scores.mean(dim=1), lengths),
        "by_length_difference": bucketed(length_difference, BUCKETS, difference=length_difference, accuracy=correct),
        "by_confidence": curve,
        "by_length": bucketed(lengths, BUCKETS, length=lengths, score=scores.mean(dim=1)),
        "by_ensemble_std": bucketed(ensemble_std, BUCKETS, ensemble_std=ensemble_std, accuracy=correct),
    }


def rating_report(scores: Tensor, rewards: Tensor, lengths: Tensor) -> dict[str, Any]:
    """Evaluate a reward model on ratings. The score of a response is the mean over the heads.

    Args:
        scores: [responses, heads] scores on the scale of the data, in reward units.
        rewards: [responses] rewards of the data, in reward units.
        lengths: [responses] tokens of the responses.
    """
    score, ensemble_std = scores.mean(dim=1), scores.std(dim=1, correction=0)
    error = (score - rewards).abs()
    return {
        "kind": "ratings",
        "count": len(score),
        "heads": scores.shape[1],
        "mean_squared_error": _mean(error.square()),
        "absolute_error": _mean(error),
        "ensemble_std": _mean(ensemble_std),
        "reward_correlation": correlations(score, rewards),
        "length_correlation": correlations(score, lengths),
        "by_reward": bucketed(rewards, BUCKETS, reward=rewards, score=score, absolute_error=error),
        "by_length": bucketed(lengths, BUCKETS, length=lengths, score=score),
        "by_ensemble_std": bucketed(ensemble_std, BUCKETS, ensemble_std=ensemble_std, absolute_error=error),
    }


def bucketed(values: Tensor, count: int, **columns: Tensor) -> list[Bucket]:
    """Divide rows into buckets of equal counts, by the quantiles of ``values``.

    Args:
        values: [rows] values of any unit. Equal values share a bucket, so there may be fewer buckets of unequal counts.
        count: Largest number of buckets.
        columns: [rows] each. Every bucket contains their means.
    """
    values = values.double()
    edges = torch.quantile(values, torch.linspace(0, 1, count + 1, dtype=torch.float64)[1:-1]).unique()
    bucket = torch.bucketize(values, edges)
    return [
        {
            "low": float(values[rows].min()),
            "high": float(values[rows].max()),
            "count": int(rows.sum()),
            **{name: float(column[rows].double().mean()) for name, column in columns.items()},
        }
        for rows in (bucket == index for index in bucket.unique())
    ]


def calibration_error(curve: list[Bucket]) -> float:
    """Return the mean absolute difference of accuracy and confidence over all rows of a calibration curve, 0 to 1."""
    rows = sum(bucket["count"] for bucket in curve)
    return sum(bucket["count"] * abs(bucket["accuracy"] - bucket["confidence"]) for bucket in curve) / rows


def correlations(values: Tensor, others: Tensor) -> dict[str, float | None]:
    """Return the Pearson and the Spearman correlation of two columns, [rows] each."""
    return {"pearson": pearson(values, others), "spearman": pearson(ranks(values), ranks(others))}


def pearson(values: Tensor, others: Tensor) -> float | None:
    """Return the Pearson correlation of two columns, [rows] each, or None if one of them is constant."""
    if values.unique().numel() < 2 or others.unique().numel() < 2:
        return None
    return float(torch.corrcoef(torch.stack([values.double(), others.double()]))[0, 1])


def ranks(values: Tensor) -> Tensor:
    """Return the ascending ranks of values, from 1, [rows] to [rows]. Equal values share their mean rank."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    group_ranks: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return group_ranks[group]


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None
