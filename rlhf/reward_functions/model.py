"""Rewards from a reward model or an ensemble of reward models."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.errors import ConfigError
from rlhf.models import Frozen, ModelSource, RewardModelEnsemble, common_count, disable_dropout, starting_point
from rlhf.reward_functions.base import RewardFunction, ScoringBatch
from rlhf.reward_functions.objective import pessimistic_score
from rlhf.schema import NonNegativeFloat, PositiveInt, check_arguments


class ModelReward(RewardFunction):
    """Scores responses with the reward model of the run, or with the reward models of ``stage.reward_model``.

    Args:
        uncertainty_penalty: Standard deviations over the members and heads of an ensemble to subtract from their mean,
            dimensionless (Coste et al. 2023, section 3.2, arXiv:2310.02743, where it is the variance).
        batch_size: Number of responses scored at once.
    """

    needs_model = True
    model: Frozen

    def __init__(self, *, uncertainty_penalty: NonNegativeFloat = 0.0, batch_size: PositiveInt = 64) -> None:
        super().__init__()
        check_arguments(ModelReward, "reward", locals())
        self.uncertainty_penalty = uncertainty_penalty
        self.batch_size = batch_size

    def load(self, sources: Sequence[ModelSource], tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = load_reward_models(sources, tokenizer)

    def forward(self, batch: ScoringBatch) -> Tensor:
        return self.combine(self.member_scores(batch))

    def member_scores(self, batch: ScoringBatch) -> Tensor:
        """Return the scores of all members and heads of the ensemble: [batch, members], in reward units."""
        model: Any = self.model.model  # ScalarModel or RewardModelEnsemble
        chunks = [slice(i, i + self.batch_size) for i in range(0, len(batch.input_ids), self.batch_size)]
        idle = common_count(model, len(chunks)) - len(chunks)  # Other ranks have more responses.
        with torch.no_grad():
            parts = [model.scores(batch.input_ids[c], batch.attention_mask[c]) for c in chunks + chunks[-1:] * idle]
        return torch.cat(parts[: len(chunks)])

    def combine(self, scores: Tensor) -> Tensor:
        """Return the reward of each response, [batch], from the scores of the members, [batch, members].

        Raises:
            ConfigError: There is an uncertainty penalty, but only one member.
        """
        if self.uncertainty_penalty and scores.shape[1] < 2:
            raise ConfigError(
                f"reward.uncertainty_penalty={self.uncertainty_penalty} requires an ensemble, but the reward model "
                "gives a single score.",
                "Set reward.uncertainty_penalty=0, train a reward model with stage=reward stage.num_heads=4, or set "
                "stage.reward_model=[<path>,<path>].",
            )
        return pessimistic_score(scores, uncertainty_penalty=self.uncertainty_penalty)


def load_reward_models(sources: Sequence[ModelSource], tokenizer: PreTrainedTokenizerBase) -> Frozen:
    """Load one reward model, or several as an ensemble, frozen and without dropout."""
    members = [disable_dropout(starting_point(source).scalar_model(tokenizer)) for source in sources]
    return Frozen(RewardModelEnsemble(members) if len(members) != 1 else members[0])
