"""The reward model's judgement, or that of several."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.models import RewardModelEnsemble, Frozen, disable_dropout, pessimistic_score
from rlhf.reward_functions.base import ScoringBatch
from rlhf.reward_functions.weighted_sum import RewardFunction


class ModelReward(RewardFunction):
    """Scores answers by the run's reward model, or by those that ``stage.reward_model`` names.

    Args:
        uncertainty_penalty: standard deviations over the members and heads of an ensemble that are taken off their mean;
            dimensionless (Coste et al. 2023, section 3.2, arXiv:2310.02743, there the variance).
        batch_size: answers scored at once.
    """

    needs_model = True
    model: Any  # Frozen, once opened

    def __init__(self, *, uncertainty_penalty: float = 0.0, batch_size: int = 64) -> None:
        super().__init__()
        if uncertainty_penalty < 0:
            raise UserError(
                f"reward.uncertainty_penalty={uncertainty_penalty} would pay for disagreement",
                "reward.uncertainty_penalty=1",
            )
        self.uncertainty_penalty = uncertainty_penalty
        self.batch_size = batch_size

    def load(self, sources: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> None:
        members = [disable_dropout(source.scalar_model(tokenizer)) for source in sources]
        self.model = Frozen(RewardModelEnsemble(members) if len(members) > 1 else members[0])

    def forward(self, answers: ScoringBatch) -> Tensor:
        pieces = [slice(i, i + self.batch_size) for i in range(0, len(answers.input_ids), self.batch_size)]
        with torch.no_grad():
            scores = torch.cat(
                [self.model.model.scores(answers.input_ids[p], answers.attention_mask[p]) for p in pieces]
            )
        if self.uncertainty_penalty and scores.shape[1] < 2:
            raise UserError(
                f"reward.uncertainty_penalty={self.uncertainty_penalty}, but a single score has no spread",
                "reward.uncertainty_penalty=0, or an ensemble: stage=reward stage.num_heads=4, or "
                "stage.reward_model=[<path>,<path>]",
            )
        return pessimistic_score(scores, uncertainty_penalty=self.uncertainty_penalty)
