"""The arithmetic of evaluation, by hand and against independent code."""

import random

import pytest
import torch

from rlhf.evaluate.objective import bootstrap_interval, rouge_l, wins


def test_bootstrap_of_equal_numbers_has_no_width() -> None:
    """Every resample of 0.25, 0.25, ... has the mean 0.25."""
    assert bootstrap_interval(torch.full((20,), 0.25)) == (0.25, 0.25, 0.25)


def test_bootstrap_interval_is_the_normal_one_for_many_numbers() -> None:
    """300 zeros and 100 ones: mean 0.25, standard error sqrt(0.25 x 0.75 / 400), interval mean -+ 1.96 errors.

    Tolerance: a quarter of a standard error, for 2000 random resamples and steps of 1/400 in their means.
    """
    error = (0.25 * 0.75 / 400) ** 0.5
    middle, low, high = bootstrap_interval(torch.tensor([0.0] * 300 + [1.0] * 100))
    assert middle == 0.25
    assert low == pytest.approx(0.25 - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(0.25 + 1.96 * error, abs=0.25 * error)


def test_bootstrap_leaves_the_global_random_state_alone() -> None:
    """The same numbers get the same interval each time, and nothing else is reseeded."""
    values = torch.arange(50.0)
    torch.manual_seed(3)
    untouched = torch.rand(4)
    torch.manual_seed(3)
    first = bootstrap_interval(values)
    assert torch.equal(torch.rand(4), untouched)
    assert bootstrap_interval(values) == first
    assert bootstrap_interval(values, seed=1) != first


def test_wins_count_ties_half() -> None:
    ours, theirs = torch.tensor([2.0, 1.0, -3.0, 0.5]), torch.tensor([1.0, 1.0, 0.0, 0.5])
    assert wins(ours, theirs).tolist() == [1.0, 0.5, 0.0, 0.5]


def test_rouge_l_by_hand() -> None:
    """The F-measure of precision = common / answer words and recall = common / target words, common in order.

    "a b c d" to "b x d": "b d" is common: 2/4 and 2/3, F = 2 x 1/2 x 2/3 / (1/2 + 2/3) = 4/7
    "d b" to "b x d": only one of both is in order: 1/2 and 1/3, F = 2/5
    case and punctuation do not count; no common word: 0; an empty answer: 0
    """
    answers = ["a b c d", "d b", "Nadia Falk, camera!", "u v", ""]
    targets = ["b x d", "b x d", "nadia falk camera", "b x d", "b x d"]
    torch.testing.assert_close(
        rouge_l(answers, targets).tolist(), [4 / 7, 2 / 5, 1.0, 0.0, 0.0], rtol=1e-6, atol=0.0
    )  # the scorer works in float32


def test_rouge_l_compares_scripts_without_spaces_letter_by_letter() -> None:
    """Of 4 and 3 letters the 2 outer ones are common, in order: 2/4 and 2/3, F = 4/7."""
    torch.testing.assert_close(rouge_l(["市長開橋"], ["市新橋"]).tolist(), [4 / 7], rtol=1e-6, atol=0.0)


def test_rouge_l_agrees_with_a_plain_longest_common_subsequence() -> None:
    """Random texts of few words, against the textbook recursion."""

    def longest(one: tuple[str, ...], other: tuple[str, ...]) -> int:
        if not one or not other:
            return 0
        if one[-1] == other[-1]:
            return longest(one[:-1], other[:-1]) + 1
        return max(longest(one[:-1], other), longest(one, other[:-1]))

    draw = random.Random(0)
    pairs = [tuple(tuple(draw.choices("abc", k=draw.randint(1, 6))) for _ in range(2)) for _ in range(20)]
    expected = [2 * longest(one, other) / (len(one) + len(other)) for one, other in pairs]
    answers, targets = ([" ".join(pair[side]) for pair in pairs] for side in (0, 1))
    torch.testing.assert_close(rouge_l(answers, targets).tolist(), expected, rtol=1e-6, atol=0.0)
