"""The critic-free stage."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.rl import Experience, OnPolicyModule


class GRPOModule(OnPolicyModule):
    """Group relative policy optimization and its relatives: several answers to a prompt, and no critic.

    Args:
        advantage: from token rewards to advantages; ``advantage=grpo|rloo|reinforce_pp|reinforce_pp_baseline``
            chooses. It is called with
            rewards and mask, [batch, time] each, and ``group_size``.
        num_generations: answers sampled to each prompt: the size of a group.
        other keys: see OnPolicyModule.
    """

    def __init__(self, *, advantage: Callable[..., Tensor], num_generations: int = 4, **online: Any) -> None:
        super().__init__(**online)
        if num_generations < getattr(getattr(advantage, "func", advantage), "smallest_group", 1):
            raise UserError(
                f"stage.num_generations={num_generations}: an answer alone has nothing to be compared with",
                "stage.num_generations=4, or advantage=reinforce_pp",
            )
        self.advantage = advantage
        self.num_generations = num_generations

    def trainable_modules(self) -> Iterator[tuple[nn.Module, float]]:
        yield self.policy, self.learning_rate

    def estimate_advantages(self, rewards: Tensor, seen: Experience) -> tuple[Tensor, None]:
        return self.advantage(rewards, seen.rollout.response_mask, group_size=self.num_generations), None
