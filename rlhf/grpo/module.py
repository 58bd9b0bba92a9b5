"""The GRPO stage."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from rlhf.errors import ConfigError
from rlhf.rl import AdvantageEstimator, OnPolicyModule
from rlhf.rl.advantages import grpo
from rlhf.rl.estimators import estimator_name, needs_critic


class GRPOModule(OnPolicyModule):
    """Group relative policy optimization and other methods without a critic (Shao et al. 2024, arXiv:2402.03300).

    By default the KL penalty is k1 in the reward, as in PPO. The cited paper uses k3 in the loss:
    ``stage.kl.apply_to=loss stage.kl.estimator=k3``.

    Args:
        advantage: The advantage estimator, selected by ``advantage=``. See ``rlhf.rl.advantages``.
        num_generations: Number of responses per prompt, the size of a group.
        keys: The remaining keys are those of ``OnPolicyModule``.

    Raises:
        ConfigError: The advantage estimator requires a critic, or as ``OnPolicyModule``.
    """

    def __init__(self, *, advantage: AdvantageEstimator = grpo, num_generations: int = 4, **keys: Any) -> None:
        if needs_critic(advantage):
            raise ConfigError(
                f"The advantage estimator {estimator_name(advantage)} requires a critic, which stage=grpo does not "
                "train.",
                "Set stage=ppo or advantage=grpo.",
            )
        super().__init__(advantage=advantage, num_generations=num_generations, **keys)

    def trainable_modules(self) -> Iterator[tuple[nn.Module, float]]:
        assert self.policy is not None
        yield self.policy, self.learning_rate
