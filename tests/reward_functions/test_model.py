"""Rewards from reward models and ensembles."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import FakeSource
from rlhf.errors import ConfigError
from rlhf.models import ScalarModel
from rlhf.reward_functions import ModelReward


class ConstantRewardModel(nn.Module):
    """A reward model whose heads give constant scores."""

    def __init__(self, *heads: float) -> None:
        super().__init__()
        self.heads = heads

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.tensor([self.heads]).expand(len(input_ids), -1)


def constant_source(*heads: float) -> Any:
    return SimpleNamespace(scalar_model=lambda tokenizer: ConstantRewardModel(*heads))


def test_uncertainty_penalty_by_hand(make_batch: Any, load: Callable[..., Any]) -> None:
    """A member with heads 1 and 3 and a member with head 5: mean 3, std sqrt((4 + 0 + 4) / 3), penalty 2 std."""
    sources = constant_source(1.0, 3.0), constant_source(5.0)
    batch = make_batch("a", "b")
    assert load(ModelReward(batch_size=1), *sources)(batch).tolist() == [3.0, 3.0]
    expected = 3 - 2 * (8 / 3) ** 0.5
    assert load(ModelReward(uncertainty_penalty=2.0), *sources)(batch).tolist() == pytest.approx([expected] * 2)


def test_uncertainty_penalty_requires_an_ensemble(make_batch: Any, load: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"reward\.uncertainty_penalty=1.* requires an ensemble"):
        load(ModelReward(uncertainty_penalty=1.0), constant_source(1.0))(make_batch("a"))


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward\.uncertainty_penalty must be a number of at least 0, got -1"):
        ModelReward(uncertainty_penalty=-1.0)
    with pytest.raises(ConfigError, match=r"reward\.batch_size must be an integer of at least 1, got 0"):
        ModelReward(batch_size=0)


def test_reward_models_are_frozen_and_not_stored(reward_model: FakeSource, load: Callable[..., Any]) -> None:
    reward = load(ModelReward(), reward_model)
    reward.train()
    assert isinstance(reward.model.model, ScalarModel)
    assert not any(module.training for module in reward.model.model.modules())
    assert not list(reward.parameters())
    assert not reward.state_dict()
