"""The reward model's judgement, or that of several."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.models import EnsembleModel, Frozen, pessimistic_score, switch_off_dropout
from rlhf.rewards.answers import Answers
from rlhf.rewards.total import Reward


class RewardModel(Reward):
    """Scores answers by the run's reward model, or by those that ``stage.reward_model`` names.

    Args:
        spread_coef: standard deviations over the members and heads of an ensemble that are taken off their mean;
            dimensionless (Coste et al. 2023, section 3.2, arXiv:2310.02743, there the variance).
        batch_size: answers scored at once.
    """

    needs_model = True
    model: Any  # Frozen, once opened

    def __init__(self, *, spread_coef: float = 0.0, batch_size: int = 64) -> None:
        super().__init__()
        if spread_coef < 0:
            raise UserError(f"reward.spread_coef={spread_coef} would pay for disagreement", "reward.spread_coef=1")
        self.spread_coef = spread_coef
        self.batch_size = batch_size

    def open(self, sources: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> None:
        members = [switch_off_dropout(source.scalar_model(tokenizer)) for source in sources]
        self.model = Frozen(EnsembleModel(members) if len(members) > 1 else members[0])

    def forward(self, answers: Answers) -> Tensor:
        pieces = [slice(i, i + self.batch_size) for i in range(0, len(answers.tokens), self.batch_size)]
        with torch.no_grad():
            scores = torch.cat([self.model.model.scores(answers.tokens[p], answers.mask[p]) for p in pieces])
        if self.spread_coef and scores.shape[1] < 2:
            raise UserError(
                f"reward.spread_coef={self.spread_coef}, but a single score has no spread",
                "reward.spread_coef=0, or an ensemble: stage=reward stage.num_heads=4, or "
                "stage.reward_model=[<path>,<path>]",
            )
        return pessimistic_score(scores, spread_coef=self.spread_coef)
