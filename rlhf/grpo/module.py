"""The critic-free stage."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.rl import Experience, OnlineModule


class GRPOModule(OnlineModule):
    """Group relative policy optimization and its relatives: several answers to a prompt, and no critic.

    Args:
        estimator: from token rewards to advantages; ``estimator=grpo|rloo|reinforce_pp|reinforce_pp_baseline``
            chooses. It is called with
            rewards and mask, [batch, time] each, and ``group_size``.
        answers_per_prompt: answers sampled to each prompt: the size of a group.
        other keys: see OnlineModule.
    """

    def __init__(self, *, estimator: Callable[..., Tensor], answers_per_prompt: int = 4, **online: Any) -> None:
        super().__init__(**online)
        if answers_per_prompt < getattr(getattr(estimator, "func", estimator), "smallest_group", 1):
            raise UserError(
                f"stage.answers_per_prompt={answers_per_prompt}: an answer alone has nothing to be compared with",
                "stage.answers_per_prompt=4, or estimator=reinforce_pp",
            )
        self.estimator = estimator
        self.answers_per_prompt = answers_per_prompt

    def trained_parts(self) -> Iterator[tuple[nn.Module, float]]:
        yield self.policy, self.learning_rate

    def estimate_advantages(self, rewards: Tensor, seen: Experience) -> tuple[Tensor, None]:
        return self.estimator(rewards, seen.rollout.answer, group_size=self.answers_per_prompt), None
