"""A reward that needs no model: is the final answer right?"""

import re
from decimal import Decimal, InvalidOperation

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.reward_functions.base import ScoringBatch
from rlhf.reward_functions.weighted_sum import RewardFunction

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class ExactMatchReward(RewardFunction):
    """Compares the final number of an answer with that of the data's own answer, as GSM8K is scored.

    Args:
        marker: text before the final number (Cobbe et al. 2021, arXiv:2110.14168: ``####``). Where an answer lacks it,
            its last number counts if ``strict`` is false.
        strict: an answer without the marker is wrong.
        correct, wrong: what a right and a wrong answer are worth, reward units.
    """

    def __init__(self, *, marker: str = "####", strict: bool = False, correct: float = 1.0, wrong: float = 0.0) -> None:
        super().__init__()
        if not correct > wrong:
            raise UserError(f"reward.correct={correct} is not above reward.wrong={wrong}", "reward.correct=1")
        self.marker = marker
        self.strict = strict
        self.correct = correct
        self.wrong = wrong

    def forward(self, answers: ScoringBatch) -> Tensor:
        rewards = []
        for text, target in zip(answers.texts, answers.targets, strict=True):
            expected = final_number(target, self.marker, strict=False) if target is not None else None
            if expected is None:
                raise UserError(
                    f"reward=exact_match: no number to compare with in the data's answer {target!r}",
                    "data whose rows have an answer ('target', 'completion' or 'chosen') that ends in a number",
                )
            right = final_number(text, self.marker, strict=self.strict) == expected
            rewards.append(self.correct if right else self.wrong)
        return torch.tensor(rewards, device=answers.input_ids.device)


def final_number(text: str, marker: str, *, strict: bool) -> Decimal | None:
    """The first number after the last marker; without a marker the last number of the text, or None if ``strict``."""
    _, found, after = text.rpartition(marker)
    if found:
        match = NUMBER.search(after)
        numbers = [match.group()] if match else []
    else:
        numbers = [] if strict else NUMBER.findall(after)[-1:]
    try:
        return Decimal(numbers[0].replace(",", "")) if numbers else None
    except InvalidOperation:
        return None
