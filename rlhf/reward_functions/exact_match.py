"""Rewards for verifiable responses: a number is correct or not."""

import re
from decimal import Decimal, InvalidOperation
from itertools import islice

import torch
from torch import Tensor

from rlhf.errors import ConfigError, DataError
from rlhf.reward_functions.base import RewardFunction, ScoringBatch
from rlhf.tensors import upload

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
# A hyphen after a word, a number or a closing bracket is no sign: 10-20, COVID-19.
NUMBER = rf"""
    (?: (?<! [\w)\]}}%] ) [-{MINUS}] (?: \\? [$€£¥] )? )?  # sign, and the currency of -$5
    (?: \d[\d,]*(?:\.\d+)? | (?<! [\w.] )\.\d+ )
    (?: [eE][-+]?\d+(?!\w) )?
"""
OPERAND = r"[ \t]* [-+({$\\]* \d[\d,.]*"
# What follows a number and makes it part of an expression. A unit does not (5/hour), nor do Markdown (**5**) and 6:00.
CONTINUATION = rf"""
    [ \t]* (?: [/÷xX{TIMES}·+] | \\(?:times|cdot|div) | }}{{ ) {OPERAND}  # 1/2, 2 x 10^8, \frac{{1}}{{2}}
    | [*]{{1,2}} \d[\d,.]* | [ ][*]{{1,2}}[ ]{OPERAND}                    # 2*3, 2 ** 3
    | [ \t]* \^ [-({{]* \w*                                            # 2^10, 2^{{n}}
    | [ \t]+ \d+/\d+ | :(?!00)\d+ | [⁰¹²³⁴-⁹¼-¾]                      # 1 1/2, 3:4, 10²
    | [ \t]* (?: (?: √ | \\sqrt ) [({{]? \d* | π | \\pi )               # 2√3, 2\pi
"""
EXPRESSION = re.compile(
    rf"(?P<function> (?: √ | sqrt | frac ) [({{]? )? (?P<number> {NUMBER} ) (?P<continuation> (?: {CONTINUATION} )* )",
    re.VERBOSE,
)
NOT_IN_DECIMAL = re.compile(r"[^-+.\deE]")  # commas and the currency


class ExactMatchReward(RewardFunction):
    """Compares the final number of a response with that of the reference response in the data, as GSM8K does.

    Args:
        marker: Text that precedes the final number (Cobbe et al. 2021, arXiv:2110.14168: ``####``). Without a marker,
            the last number of a response is compared, unless ``strict`` is true.
        strict: Whether a response without the marker is incorrect.
        correct: Reward of a correct response, in reward units.
        wrong: Reward of an incorrect response, in reward units.
    """

    needs_targets = True

    def __init__(self, *, marker: str = "####", strict: bool = False, correct: float = 1.0, wrong: float = 0.0) -> None:
        super().__init__()
        if not correct > wrong:
            raise ConfigError(
                f"reward.correct must be greater than reward.wrong ({wrong}), got {correct}.",
                "Set reward.correct=1 reward.wrong=0.",
            )
        if not marker:
            raise ConfigError(
                "reward.marker must not be empty, got ''.",
                "Set reward.marker='####'. Without it, the last number of a response counts if reward.strict=false.",
            )
        self.marker = marker
        self.strict = strict
        self.correct = correct
        self.wrong = wrong

    def check_target(self, target: str | None) -> None:
        self._expected(target)

    def _expected(self, target: str | None) -> Decimal:
        """Return the final number of a reference response."""
        expected = None if target is None else final_number(target, self.marker, strict=False)
        if expected is None:
            raise DataError(
                f"reward=exact_match requires a reference response that ends in a number, got {target!r}.",
                "Use data whose records have such a 'target', 'completion' or 'chosen' field. Write 1/2 as 0.5: "
                "fractions, powers and products are not evaluated.",
            )
        return expected

    def forward(self, batch: ScoringBatch) -> Tensor:
        rewards = []
        for response, target in zip(batch.responses, batch.targets, strict=True):
            matches = final_number(response, self.marker, strict=self.strict) == self._expected(target)
            rewards.append(self.correct if matches else self.wrong)
        return upload(torch.tensor(rewards, dtype=torch.float), batch.input_ids.device)


def final_number(text: str, marker: str, *, strict: bool) -> Decimal | None:
    """Return the first number after the last marker.

    Args:
        text: Text to search.
        marker: Text that precedes the number.
        strict: Whether to return None for a text without the marker, instead of its last number.

    Returns:
        The number, or None if there is none, or if it is part of an expression such as 1/2 or 2^10.
    """
    _, found, after = text.rpartition(marker)
    if strict and not found:
        return None
    expressions = list(islice(EXPRESSION.finditer(after), 1 if found else None))
    if not expressions or expressions[-1]["function"] or expressions[-1]["continuation"]:
        return None
    try:
        return Decimal(NOT_IN_DECIMAL.sub("", expressions[-1]["number"].replace(MINUS, "-")))
    except InvalidOperation:
        return None
