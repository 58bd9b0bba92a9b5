"""What every reward is, and the weighted sum of several."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.reward_functions.base import ScoringBatch


class RewardFunction(nn.Module):
    """From answers to numbers: [batch], reward units, higher is better.

    needs_model: True if it reads the reward model's file.
    """

    needs_model = False

    def load(self, sources: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> None:
        """Load what it needs, before training.

        Args:
            sources: where the reward models come from; empty if ``needs_model`` is False.
            tokenizer: the policy's.
        """

    def forward(self, answers: ScoringBatch) -> Tensor:
        raise NotImplementedError

    def score_with_components(self, answers: ScoringBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The reward, [batch], and the single rewards behind it, name to [batch], for the log."""
        return self(answers), {}


class WeightedSumReward(RewardFunction):
    """Several rewards at once.

    Args:
        components: name to reward.
        weights: name to weight; a part without one, or with 0, is left out and not even opened.
    """

    def __init__(self, *, components: Mapping[str, RewardFunction], weights: Mapping[str, float]) -> None:
        super().__init__()
        if unknown := sorted(set(weights) - set(components)):
            raise UserError(
                f"reward.weights.{unknown[0]}: there is no such part", f"parts: {', '.join(sorted(components))}"
            )
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        if not self.weights:
            raise UserError("reward.weights are all 0: nothing is rewarded", "reward.weights.model=1")
        self.chosen = {name: components[name] for name in self.weights}
        self.rewards = nn.ModuleDict(self.chosen)  # so that they follow the stage to its device

    @property
    def needs_model(self) -> bool:  # type: ignore[override]
        return any(part.needs_model for part in self.chosen.values())

    def load(self, sources: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> None:
        for part in self.chosen.values():
            part.load(sources if part.needs_model else (), tokenizer)

    def forward(self, answers: ScoringBatch) -> Tensor:
        return self.score_with_components(answers)[0]

    def score_with_components(self, answers: ScoringBatch) -> tuple[Tensor, dict[str, Tensor]]:
        parts = {name: part(answers) for name, part in self.chosen.items()}
        return torch.stack([self.weights[name] * scores for name, scores in parts.items()]).sum(dim=0), parts
