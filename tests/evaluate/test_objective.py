"""Statistics of evaluation, by hand and against independent implementations."""

import random

import pytest
import torch

from rlhf.evaluate import objective
from rlhf.evaluate.objective import bootstrap_interval, rouge_l, wins


def test_bootstrap_interval_of_equal_values_has_width_zero() -> None:
    """Every resample of 0.25, 0.25, ... has mean 0.25."""
    assert bootstrap_interval(torch.full((20,), 0.25)) == (0.25, 0.25, 0.25)


def test_bootstrap_interval_approaches_the_normal_interval() -> None:
    """300 zeros and 100 ones: mean 0.25, standard error sqrt(0.25 x 0.75 / 400), interval mean -+ 1.96 standard errors.

    Tolerance: a quarter of a standard error, because there are 2,000 resamples whose means are multiples of 1/400.
    """
    error = (0.25 * 0.75 / 400) ** 0.5
    mean, low, high = bootstrap_interval(torch.tensor([0.0] * 300 + [1.0] * 100))
    assert mean == 0.25
    assert low == pytest.approx(0.25 - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(0.25 + 1.96 * error, abs=0.25 * error)


def test_bootstrap_does_not_use_the_global_random_state() -> None:
    """Equal values get equal intervals, and the global generator is not reseeded."""
    values = torch.arange(50.0)
    torch.manual_seed(3)
    untouched = torch.rand(4)
    torch.manual_seed(3)
    first = bootstrap_interval(values)
    assert torch.equal(torch.rand(4), untouched)
    assert bootstrap_interval(values) == first
    assert bootstrap_interval(values, seed=1) != first


def test_bootstrap_of_many_prompts_is_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The intervals are those of a single chunk."""
    values = torch.randn(300, generator=torch.Generator().manual_seed(0))
    at_once = bootstrap_interval(values)
    monkeypatch.setattr(objective, "DRAWN_AT_ONCE", 1000)
    assert bootstrap_interval(values) == at_once


def test_a_tie_is_half_a_win() -> None:
    scores, other_scores = torch.tensor([2.0, 1.0, -3.0, 0.5]), torch.tensor([1.0, 1.0, 0.0, 0.5])
    assert wins(scores, other_scores).tolist() == [1.0, 0.5, 0.0, 0.5]


def test_rouge_l_by_hand() -> None:
    """F-measure of precision = LCS / words of the response and recall = LCS / words of the target.

    "a b c d" and "b x d": the longest common subsequence is "b d": 2/4 and 2/3, F = 2 x 1/2 x 2/3 / (1/2 + 2/3) = 4/7
    "d b" and "b x d": its length is 1: 1/2 and 1/3, F = 2/5
    Case and punctuation are ignored. Without a common word, or with an empty response, F = 0.
    """
    responses = ["a b c d", "d b", "Nadia Falk, camera!", "u v", ""]
    targets = ["b x d", "b x d", "nadia falk camera", "b x d", "b x d"]
    torch.testing.assert_close(
        rouge_l(responses, targets).tolist(), [4 / 7, 2 / 5, 1.0, 0.0, 0.0], rtol=1e-6, atol=0.0
    )  # torchmetrics computes in float32


def test_rouge_l_compares_scripts_without_spaces_by_character() -> None:
    """4 and 3 characters; the longest common subsequence has 2: 2/4 and 2/3, F = 4/7."""
    torch.testing.assert_close(rouge_l(["市長開橋"], ["市新橋"]).tolist(), [4 / 7], rtol=1e-6, atol=0.0)


def test_rouge_l_agrees_with_the_textbook_recursion() -> None:
    """Random texts with a vocabulary of three words."""

    def longest(one: tuple[str, ...], other: tuple[str, ...]) -> int:
        if not one or not other:
            return 0
        if one[-1] == other[-1]:
            return longest(one[:-1], other[:-1]) + 1
        return max(longest(one[:-1], other), longest(one, other[:-1]))

    generator = random.Random(0)
    pairs = [tuple(tuple(generator.choices("abc", k=generator.randint(1, 6))) for _ in range(2)) for _ in range(20)]
    expected = [2 * longest(one, other) / (len(one) + len(other)) for one, other in pairs]
    responses, targets = ([" ".join(pair[side]) for pair in pairs] for side in (0, 1))
    torch.testing.assert_close(rouge_l(responses, targets).tolist(), expected, rtol=1e-6, atol=0.0)
