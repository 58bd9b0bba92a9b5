"""Weighted sums of rewards."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.errors import ConfigError
from rlhf.models import ModelSource
from rlhf.reward_functions.base import RewardFunction, ScoringBatch, check_rewards
from rlhf.reward_functions.python import PythonReward


class WeightedSumReward(RewardFunction):
    """Weighted sum of several reward functions. Each component is logged as ``reward/<name>``.

    Args:
        components: Reward functions by name, without dots. One that is given as ``{path: <file.py>:<function>}`` is a
            ``PythonReward``.
        weights: Weights by the same names, dimensionless. A component without a weight or with weight 0 is not used or
            loaded.

    Raises:
        ConfigError: A name is not allowed or unknown, or all weights are 0.
    """

    def __init__(
        self, *, components: Mapping[str, RewardFunction | Mapping[str, Any]], weights: Mapping[str, float]
    ) -> None:
        super().__init__()
        if unknown := sorted(set(weights) - set(components)):
            raise ConfigError(
                f"reward.weights contains {unknown[0]}, which is not one of the components "
                f"({', '.join(sorted(components))}).",
                f"Remove reward.weights.{unknown[0]} or add reward.components.{unknown[0]}.",
            )
        if dotted := [name for name in components if "." in name]:
            raise ConfigError(
                f"reward.components contains {dotted[0]!r}. Names of components must not contain dots.",
                f"Rename it to {dotted[0].replace('.', '_')} in reward.components and reward.weights.",
            )
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        if not self.weights:
            raise ConfigError("reward.weights must contain a weight other than 0.", "Set reward.weights.model=1.")
        self.components = {name: _component(name, components[name]) for name in self.weights}
        # Registered, so that they follow the stage to its device. A module may not be named like one of its methods.
        self.rewards = nn.ModuleDict({f"reward_{name}": component for name, component in self.components.items()})

    @property
    def needs_model(self) -> bool:  # type: ignore[override]
        return any(component.needs_model for component in self.components.values())

    @property
    def needs_targets(self) -> bool:  # type: ignore[override]
        return any(component.needs_targets for component in self.components.values())

    @property
    def columns(self) -> dict[str, bool]:  # type: ignore[override]
        required: dict[str, bool] = {}
        for component in self.components.values():
            for name, needed in component.columns.items():
                required[name] = required.get(name, False) or needed
        return required

    def check_target(self, target: str | None) -> None:
        for component in self.components.values():
            component.check_target(target)

    def load(self, sources: Sequence[ModelSource], tokenizer: PreTrainedTokenizerBase) -> None:
        for component in self.components.values():
            component.load(sources if component.needs_model else (), tokenizer)

    def forward(self, batch: ScoringBatch) -> Tensor:
        return self.score_with_components(batch)[0]

    def score_with_components(self, batch: ScoringBatch) -> tuple[Tensor, dict[str, Tensor]]:
        rewards = {name: component(batch) for name, component in self.components.items()}
        for name, component in self.components.items():
            check_rewards(component, rewards[name], len(batch.responses))
        return torch.stack([self.weights[name] * values for name, values in rewards.items()]).sum(dim=0), rewards


def _component(name: str, given: RewardFunction | Mapping[str, Any]) -> RewardFunction:
    """Return a component: the reward function itself, or that of the Python function at ``path``."""
    if isinstance(given, RewardFunction):
        return given
    if set(given) != {"path"}:
        raise ConfigError(
            f"reward.components.{name} must have the key path, or a class in _target_, got {', '.join(given)}.",
            f"Set +reward.components.{name}.path=<file.py>:<function>.",
        )
    return PythonReward(path=given["path"])
