"""Rewards for correct numbers."""

from decimal import Decimal
from typing import Any

import pytest
import torch

from rlhf.errors import ConfigError, DataError
from rlhf.reward_functions import ExactMatchReward
from rlhf.reward_functions.exact_match import final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 + 4 = 7 apples.\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("so 5 #### 6 #### -2.50 euros 9", "-2.50"),
        ("it is 12, or 13", "13"),
        ("none", None),
        ("#### none 3", "3"),
        ("#### .5", "0.5"),
        ("it is -.25", "-0.25"),
        ("version 1.2.3", "3"),
        ("it is ...5", "5"),
        ("pages 10-20", "20"),
        ("#### 10-20", "10"),
        ("COVID-19", "19"),
        ("(10)-20", "20"),
        ("#### \N{MINUS SIGN}7", "-7"),
        ("x=-7", "-7"),
        ("$-7$", "-7"),
        (r"\boxed{-7}", "-7"),
        ("#### -$5", "-5"),
        (r"#### -\$1,250.50", "-1250.50"),
        ("#### $-5", "-5"),
        ("10-$20", "20"),
        ("#### 1e3", "1000"),
        ("x = 2.5E-1", "0.25"),
        ("#### 5/hour", "5"),
        ("**#### 18**", "18"),
        ("**18** 5-packs", "5"),
        ("at 6:00", "0"),
        ("#### 6:00", "6"),
        ("#### 18\n* 3 apples", "18"),
        ("2 x 9 = $18", "18"),
    ],
)
def test_final_number_is_the_first_after_the_last_marker(text: str, number: str | None) -> None:
    """Without a marker it is the last number of the text. A hyphen between words or numbers is no sign."""
    assert final_number(text, "####", strict=False) == (None if number is None else Decimal(number))


PLAIN = "1/2, 1 / 2, 1 1/2, 2^10, 2^{n}, 2**10, 2 * 3, 2 x 10^8, 2 + 3, 3:4, 10², 1½, 2√3, 2π, sqrt(3), 1/-2, $1/$2"
LATEX = r"\frac{1}{2}, \frac12, \sqrt{3}, 2\sqrt{3}, 2 \times 3, 2\cdot 3, 2\pi"


@pytest.mark.parametrize("expression", [*PLAIN.split(", "), *LATEX.split(", "), "2\N{MULTIPLICATION SIGN}10"])
def test_a_number_within_an_expression_is_not_the_final_number(make_batch: Any, expression: str) -> None:
    """Neither operand counts, with or without a marker: 1/2 is not 1 and not 2."""
    texts = [f"#### {expression}", f"5 * 6 = 30, so it is {expression}"]
    assert [final_number(text, "####", strict=False) for text in texts] == [None, None]
    digits = [digit for digit in expression if digit in "0123456789"]
    targets = tuple(f"#### {digit}" for digit in digits)
    assert ExactMatchReward()(make_batch(*[texts[0]] * len(digits), targets=targets)).tolist() == [0.0] * len(digits)


@pytest.mark.parametrize("target", ["#### 1/2", "#### 2 x 10^8", "#### 2^10", r"#### \frac{1}{2}"])
def test_targets_must_not_be_expressions(target: str) -> None:
    """Before, the first number of the target counted, so a response of 1 was correct for 1/2."""
    with pytest.raises(DataError, match=r"ends in a number, got (.|\n)* fractions, powers and products are not"):
        ExactMatchReward().check_target(target)


def test_exact_match_by_hand(make_batch: Any) -> None:
    """18 and 18.0 are equal. Without the marker, a response is incorrect only if strict. No number is incorrect."""
    batch = make_batch("9 + 9 #### 18.0", "it is 18", "#### 17", "eighteen", targets=("... #### 18",) * 4)
    assert ExactMatchReward(wrong=-0.5)(batch).tolist() == [1.0, 1.0, -0.5, -0.5]
    assert ExactMatchReward(strict=True)(batch).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_rewards_are_float32(make_batch: Any) -> None:
    """Rewards that are given as integers as well. The default dtype of ``trainer.precision=bf16-true`` is bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        rewards = ExactMatchReward(correct=257, wrong=0)(make_batch("#### 1", targets=("1",)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [257.0]


@pytest.mark.parametrize("target", [None, "no number"])
def test_targets_must_contain_a_number(make_batch: Any, target: str | None) -> None:
    with pytest.raises(DataError, match="requires a reference response that ends in a number"):
        ExactMatchReward()(make_batch("#### 1", targets=(target,)))


def test_correct_must_be_worth_more_than_wrong() -> None:
    with pytest.raises(ConfigError, match=r"reward\.correct must be greater than reward\.wrong \(0\.0\), got 0\.0"):
        ExactMatchReward(correct=0.0)


def test_the_marker_must_not_be_empty() -> None:
    with pytest.raises(
        ConfigError, match=r"^reward\.marker must not be empty, got ''\.\n  Set reward\.marker='####'\."
    ):
        ExactMatchReward(marker="")
