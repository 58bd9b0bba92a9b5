"""Report on a trained reward model, by hand."""

import json
import math

import pytest
import torch

from rlhf.reward.report import bucketed, calibration_error, correlations, pair_report, pearson, ranks, rating_report


def test_bucketed_by_hand() -> None:
    """Six unsorted values in three buckets of two, with the mean of a column per bucket.

    sorted values: -4 -1 | 0 2 | 3 7      column in the same order: 1 0 | 1 1 | 0 0
    """
    values, column = torch.tensor([3, -4, 0, 7, 2, -1]), torch.tensor([0, 1, 1, 0, 1, 0])
    assert bucketed(values, 3, hits=column) == [
        {"low": -4, "high": -1, "count": 2, "hits": 0.5},
        {"low": 0, "high": 2, "count": 2, "hits": 1.0},
        {"low": 3, "high": 7, "count": 2, "hits": 0.0},
    ]


def test_equal_values_share_a_bucket() -> None:
    """Five 1s and a 4 have two buckets instead of three. Constant values have one."""
    assert [(b["low"], b["count"]) for b in bucketed(torch.tensor([1, 1, 4, 1, 1, 1]), 3)] == [(1, 5), (4, 1)]
    assert [(b["low"], b["count"]) for b in bucketed(torch.full((4,), 2.0), 3)] == [(2, 4)]
    assert [(b["low"], b["count"]) for b in bucketed(torch.tensor([5.0]), 3)] == [(5, 1)]


def test_distinct_values_have_buckets_of_equal_counts() -> None:
    """The quantiles are between two rows, never equal to one."""
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert [bucket["count"] for bucket in bucketed(values, 10)] == [10] * 10


def test_ranks_by_hand() -> None:
    """The ranks of 10, 20, 20, 5 are 2, 3 and 4 (shared: 3.5), 1."""
    assert ranks(torch.tensor([10.0, 20.0, 20.0, 5.0])).tolist() == [2, 3.5, 3.5, 1]


def test_correlations_by_hand() -> None:
    """x = 1, 2, 3, 4 and y = 1, 4, 9, 100.

    x - 2.5 = -1.5, -0.5, 0.5, 1.5; y - 28.5 = -27.5, -24.5, -19.5, 71.5
    products 41.25 + 12.25 - 9.75 + 107.25 = 151; squares 5 and 756.25 + 600.25 + 380.25 + 5112.25 = 6849
    Pearson: 151 / sqrt(5 x 6849). The order is the same, so Spearman is 1; with x reversed it is -1.
    """
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1, 4, 9, 100])
    assert correlations(x, y)["pearson"] == pytest.approx(151 / math.sqrt(5 * 6849))
    assert correlations(x, y)["spearman"] == pytest.approx(1)
    assert correlations(x.flip(0), y)["spearman"] == pytest.approx(-1)


def test_constant_columns_have_no_correlation() -> None:
    assert pearson(torch.ones(3), torch.arange(3)) is None
    assert pearson(torch.arange(3), torch.full((3,), 0.1)) is None
    assert pearson(torch.tensor([1.0]), torch.tensor([2.0])) is None


def test_calibration_error_by_hand() -> None:
    """Three rows differ by 0.1 and one by -0.3: (3 x 0.1 + 0.3) / 4 = 0.15."""
    curve = [
        {"count": 3, "confidence": 0.6, "accuracy": 0.7},
        {"count": 1, "confidence": 0.8, "accuracy": 0.5},
    ]
    assert calibration_error(curve) == pytest.approx(0.15)


def test_pair_report_by_hand() -> None:
    """Four pairs and two heads, whose mean is the score.

    chosen, rejected  difference  correct  tokens  length difference  differences of the heads  ensemble_std
      2, 1                1         yes    8 - 5           3                    2, 0                  1
      0, 1               -1         no     4 - 6          -2                   -1, -1                 0
      3, 1                2         yes    7 - 7           0                    4, 0                  2
      1, 0                1         yes    5 - 9          -4                    1, 1                  0
    """
    chosen = torch.tensor([[3.0, 1.0], [0.0, 0.0], [5.0, 1.0], [1.0, 1.0]])
    rejected = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    report = pair_report(chosen, rejected, torch.tensor([8, 4, 7, 5]), torch.tensor([5, 6, 7, 9]))
    assert (report["kind"], report["count"], report["heads"]) == ("pairs", 4, 2)
    assert report["accuracy"] == 0.75
    assert report["margin"] == 0.75
    assert report["ensemble_std"] == pytest.approx((1 + 0 + 2 + 0 + 0 + 0 + 0 + 0) / 8)
    assert report["longer_chosen"] == {"count": 1, "accuracy": 1.0}
    assert report["shorter_chosen"] == {"count": 2, "accuracy": 0.5}
    assert [(b["difference"], b["accuracy"]) for b in report["by_length_difference"]] == [
        (-4, 1),
        (-2, 0),
        (0, 1),
        (3, 1),
    ]
    # The confidence is sigmoid(1) three times, two of them correct, and sigmoid(2) once, correct.
    one, two = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    assert [(b["count"], b["confidence"]) for b in report["by_confidence"]] == [
        (3, pytest.approx(one)),
        (1, pytest.approx(two)),
    ]
    assert report["calibration_error"] == pytest.approx((3 * abs(2 / 3 - one) + abs(1 - two)) / 4)
    # All eight responses.
    scores, lengths = [2, 0, 3, 1, 1, 1, 1, 0], [8, 4, 7, 5, 5, 6, 7, 9]
    assert report["length_correlation"]["pearson"] == pytest.approx(correlation(scores, lengths))
    shared = [7, 1.5, 8, 4.5, 4.5, 4.5, 4.5, 1.5], [7, 1, 5.5, 2.5, 2.5, 4, 5.5, 8]
    assert report["length_correlation"]["spearman"] == pytest.approx(correlation(*shared))
    assert sum(b["count"] for b in report["by_length"]) == 8
    # ensemble_std is 0, 0, 1, 2. Of the two pairs with 0, one is correct.
    assert [(b["ensemble_std"], b["accuracy"]) for b in report["by_ensemble_std"]] == [(0, 0.5), (1, 1), (2, 1)]
    json.dumps(report, allow_nan=False)


def test_pair_report_of_a_tie() -> None:
    """Equal scores and lengths: accuracy 0, as in ``val/accuracy``, confidence 1/2, and an undefined correlation."""
    report = pair_report(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([4]), torch.tensor([4]))
    assert (report["accuracy"], report["calibration_error"], report["ensemble_std"]) == (0, 0.5, 0)
    assert report["longer_chosen"] == report["shorter_chosen"] == {"count": 0, "accuracy": None}
    assert report["length_correlation"] == {"pearson": None, "spearman": None}
    json.dumps(report, allow_nan=False)


def test_rating_report_by_hand() -> None:
    """Three responses and two heads.

    scores  mean  reward  error  tokens  ensemble_std
    1, 3      2      1       1      4        1
    2, 2      2      2       0      6        0
    4, 6      5      3       2      5        1
    """
    scores = torch.tensor([[1.0, 3.0], [2.0, 2.0], [4.0, 6.0]])
    report = rating_report(scores, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4, 6, 5]))
    assert (report["kind"], report["count"], report["heads"]) == ("ratings", 3, 2)
    assert report["mean_squared_error"] == pytest.approx(5 / 3)
    assert report["absolute_error"] == pytest.approx(1)
    assert report["ensemble_std"] == pytest.approx(2 / 3)
    assert report["reward_correlation"]["pearson"] == pytest.approx(correlation([2, 2, 5], [1, 2, 3]))
    assert report["reward_correlation"]["spearman"] == pytest.approx(correlation([1.5, 1.5, 3], [1, 2, 3]))
    assert report["length_correlation"]["pearson"] == pytest.approx(correlation([2, 2, 5], [4, 6, 5]))
    assert [(b["reward"], b["score"], b["absolute_error"]) for b in report["by_reward"]] == [
        (1, 2, 1),
        (2, 2, 0),
        (3, 5, 2),
    ]
    assert [(b["ensemble_std"], b["absolute_error"]) for b in report["by_ensemble_std"]] == [(0, 0), (1, 1.5)]
    json.dumps(report, allow_nan=False)


def correlation(x: list[float], y: list[float]) -> float:
    """Return the Pearson correlation by its definition."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
