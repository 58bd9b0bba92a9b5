"""Statistics of choices, by hand."""

import math

import pytest

from rlhf.label.statistics import cohens_kappa, wilson_interval


def test_kappa_by_hand() -> None:
    """Ten pairs: both choose a 4 times, both b 3 times; (a, b) 2 times and (b, a) once.

    p_o = 0.7;  the first annotator has a: 6, b: 4; the second one a: 5, b: 5
    p_e = 0.6 * 0.5 + 0.4 * 0.5 = 0.5;  kappa = (0.7 - 0.5) / 0.5 = 0.4
    """
    choices = [("a", "a")] * 4 + [("b", "b")] * 3 + [("a", "b")] * 2 + [("b", "a")]
    assert cohens_kappa(choices) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("choices", "kappa"),
    [([("a", "a"), ("b", "b")], 1.0), ([("a", "b"), ("b", "a")], -1.0), ([("a", "a"), ("a", "b")], 0.0)],
)
def test_kappa_of_few_pairs(choices: list[tuple[str, str]], kappa: float) -> None:
    assert cohens_kappa(choices) == pytest.approx(kappa)


@pytest.mark.parametrize("choices", [[], [("a", "a")] * 5])
def test_kappa_is_undefined_without_variation(choices: list[tuple[str, str]]) -> None:
    assert math.isnan(cohens_kappa(choices))


def test_wilson_interval_by_hand() -> None:
    """8 of 10. With z^2 = 3.8415: the center is (0.8 + 0.19207) / 1.38415 = 0.71674, and the half width is
    1.95996 / 1.38415 * sqrt(0.016 + 0.0096037) = 0.22658.
    """
    share, low, high = wilson_interval(8, 10)
    assert (share, low, high) == pytest.approx((0.8, 0.49016, 0.94332), abs=2e-5)


@pytest.mark.parametrize(("wins", "count"), [(0, 3), (3, 3), (0.5, 1)])
def test_intervals_stay_within_0_and_1(wins: float, count: int) -> None:
    share, low, high = wilson_interval(wins, count)
    assert 0 <= low <= share <= high <= 1
