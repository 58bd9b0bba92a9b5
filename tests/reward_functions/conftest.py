"""Batches of responses to score."""

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch

from rlhf.reward_functions import ScoringBatch

MakeBatch: TypeAlias = Callable[..., ScoringBatch]


@pytest.fixture
def make_batch() -> MakeBatch:
    """A function that makes a batch of responses to the prompts ``p0``, ``p1``, ..., with optional targets."""

    def make(*responses: str, targets: tuple[str | None, ...] | None = None) -> ScoringBatch:
        input_ids = torch.zeros(len(responses), 3, dtype=torch.long)
        prompts = [f"p{i}" for i in range(len(responses))]
        return ScoringBatch(input_ids, input_ids == 0, prompts, responses, targets or (None,) * len(responses))

    return make


@pytest.fixture
def load() -> Callable[..., Any]:
    """A function that loads a reward function, with reward model sources if it needs some, and returns it."""

    def load(reward: Any, *sources: Any) -> Any:
        reward.load(sources, None)
        return reward

    return load
