"""What a trained reward model is like on held-out data: accuracy, calibration and length bias. Arithmetic only.

A report is a dict of numbers, of dicts of numbers and of lists of buckets, ready for JSON; ``None`` where a number has
no meaning. A bucket holds rows of like value: ``low`` and ``high`` are its limits, ``count`` its rows, the rest means.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor

Bucket: TypeAlias = dict[str, float]

BUCKETS = 5  # of lengths, spreads and rewards
CURVE_BINS = 10  # of the reliability curve


def pair_report(
    chosen: Tensor,  # [pairs, heads] scores of the better answers, reward units
    rejected: Tensor,  # [pairs, heads] scores of the others, reward units
    chosen_length: Tensor,  # [pairs] tokens of the better answers
    rejected_length: Tensor,  # [pairs] tokens of the others
) -> dict[str, Any]:
    """A reward model on preference pairs; a score is the mean over its heads.

    ``by_confidence`` is the reliability curve: how often the higher-scored answer is the chosen one, against how sure
    the model is of it, sigmoid of the distance of the scores. ``calibration_error`` is its expected calibration error
    (Guo et al. 2017, eq. 3, arXiv:1706.04599), over bins of equal counts. Labels are taken as they are: where one in
    ten is wrong, a calibrated model is never surer than 0.9.
    """

    difference, longer_by = (chosen - rejected).mean(dim=1), chosen_length - rejected_length
    scores, lengths = torch.cat([chosen, rejected]), torch.cat([chosen_length, rejected_length])
    right, confidence = difference > 0, difference.abs().sigmoid()
    disagreement = (chosen - rejected).std(dim=1, correction=0)
    curve = bucketed(confidence, CURVE_BINS, confidence=confidence, accuracy=right)
    return {
        "kind": "pairs",
        "count": len(difference),
        "heads": chosen.shape[1],
        "accuracy": _mean(right),
        "margin": _mean(difference),
        "spread": _mean(scores.std(dim=1, correction=0)),
        "calibration_error": calibration_error(curve),
        "longer_chosen": {"count": int((longer_by > 0).sum()), "accuracy": _mean(right[longer_by > 0])},
        "shorter_chosen": {"count": int((longer_by < 0).sum()), "accuracy": _mean(right[longer_by < 0])},
        "length_correlation": correlations(scores.mean(dim=1), lengths),
        "by_length_difference": bucketed(longer_by, BUCKETS, difference=longer_by, accuracy=right),
        "by_confidence": curve,
        "by_length": bucketed(lengths, BUCKETS, length=lengths, score=scores.mean(dim=1)),
        "by_spread": bucketed(disagreement, BUCKETS, spread=disagreement, accuracy=right),
    }


def rating_report(
    scores: Tensor,  # [answers, heads] reward units, on the scale of the data
    rewards: Tensor,  # [answers] what the data say, reward units
    lengths: Tensor,  # [answers] tokens
) -> dict[str, Any]:
    """A reward model on ratings; a score is the mean over its heads."""

    score, spread = scores.mean(dim=1), scores.std(dim=1, correction=0)
    error = (score - rewards).abs()
    return {
        "kind": "ratings",
        "count": len(score),
        "heads": scores.shape[1],
        "mean_squared_error": _mean(error.square()),
        "absolute_error": _mean(error),
        "spread": _mean(spread),
        "reward_correlation": correlations(score, rewards),
        "length_correlation": correlations(score, lengths),
        "by_reward": bucketed(rewards, BUCKETS, reward=rewards, score=score, absolute_error=error),
        "by_length": bucketed(lengths, BUCKETS, length=lengths, score=score),
        "by_spread": bucketed(spread, BUCKETS, spread=spread, absolute_error=error),
    }


def bucketed(values: Tensor, count: int, **columns: Tensor) -> list[Bucket]:
    """Rows in buckets of equal counts, by quantiles of ``values``.

    Args:
        values: [rows], any unit; equal ones stay together, so that there may be fewer and unequal buckets.
        count: most buckets.
        columns: [rows] each; their means are told of every bucket.
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
        for rows in (bucket == number for number in bucket.unique())
    ]


def calibration_error(curve: list[Bucket]) -> float:
    """Mean distance of accuracy from confidence over the buckets, each weighing as many as its rows; 0 to 1."""
    rows = sum(bucket["count"] for bucket in curve)
    return sum(bucket["count"] * abs(bucket["accuracy"] - bucket["confidence"]) for bucket in curve) / rows


def correlations(values: Tensor, others: Tensor) -> dict[str, float | None]:
    """Pearson's and Spearman's correlation of two columns, [rows] each; Spearman's is Pearson's of the ranks."""
    return {"pearson": pearson(values, others), "spearman": pearson(ranks(values), ranks(others))}


def pearson(values: Tensor, others: Tensor) -> float | None:
    """Correlation of two columns, [rows] each, -1 to 1; None where one of them does not vary."""
    if values.unique().numel() < 2 or others.unique().numel() < 2:
        return None
    return float(torch.corrcoef(torch.stack([values.double(), others.double()]))[0, 1])


def ranks(values: Tensor) -> Tensor:
    """Place of each value in ascending order, [rows] to [rows], from 1; equal ones share the mean of their places."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    places: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return places[which]


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None
