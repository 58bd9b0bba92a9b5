"""Metrics of rollouts, by hand."""

import pytest

from rlhf.rl.metrics import repeated_ngram_fraction


def test_repeated_ngram_fraction_by_hand() -> None:
    """Bigrams of 1 2 1 2 1: 12, 21, 12, 21, two of four are repeated; of 5 6 7: 56, 67, none. In total 2 of 6."""
    assert repeated_ngram_fraction([[1, 2, 1, 2, 1], [5, 6, 7], [9]], 2) == pytest.approx(1 / 3)


def test_repeated_ngram_fraction_of_short_responses_is_zero() -> None:
    assert repeated_ngram_fraction([[9], []], 2) == 0.0


def test_repeated_ngram_fraction_of_one_repeated_token() -> None:
    """Ten equal tokens contain 7 n-grams of 4 tokens, and all but the first are repeated."""
    assert repeated_ngram_fraction([[4] * 10]) == pytest.approx(1 - 1 / 7)
