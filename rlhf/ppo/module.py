"""The PPO stage."""

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from rlhf.data import RecordDataModule
from rlhf.declared import declared_arguments
from rlhf.errors import ConfigError
from rlhf.models import ScalarHead
from rlhf.ppo.critic import critic_width, open_separate_critic
from rlhf.ppo.preflight import critic_checks
from rlhf.rl import AdvantageEstimator, Experience, Minibatch, OnPolicyModule
from rlhf.rl.advantage_calls import estimator_name, needs_critic
from rlhf.rl.advantages import gae
from rlhf.rl.models import Critic
from rlhf.rl.objective import clipped_value_loss
from rlhf.schema import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, has_default
from rlhf.stage.check import Check
from rlhf.tensors import masked_scale, masked_whiten

# Settings without effect if the advantage estimator does not declare the argument.
ADVANTAGE_KEYS = {"gamma": "gamma", "gae_lambda": "gae_lambda", "whiten_rewards": "rewards"}
CRITIC_KEYS = {
    *("value_clip_range", "value_coef", "critic", "critic_init", "critic_warmup", "critic_learning_rate", "obs_dim")
}


class PPOModule(OnPolicyModule):
    """Proximal policy optimization of a language model (Schulman et al. 2017; Ziegler et al. 2019).

    The critic is built only if the advantage estimator declares ``values``, as ``gae`` does.

    Args:
        advantage: The advantage estimator, selected by ``advantage=``. See ``rlhf.rl.advantages``.
        gamma: Discount factor per token, for estimators that declare ``gamma``. ``advantage=reinforce_pp`` has a
            separate one, ``stage.advantage.gamma``.
        gae_lambda: lambda of generalized advantage estimation, for estimators that declare ``gae_lambda`` (Schulman et
            al. 2016, arXiv:1506.02438).
        whiten_rewards: Scale the token rewards of a rollout to unit variance, keeping their mean, before advantages are
            estimated.
        whiten_advantages: Shift and scale the advantages of a rollout to zero mean and unit variance; null: only with a
            critic, because the other estimators normalize them as published.
        value_clip_range: Clip range of the value loss, in reward units. null disables clipping.
        value_coef: Weight of the value loss.
        critic: ``separate`` trains a separate model, ``shared`` a value head on the policy.
        critic_init: Initial weights of a separate critic: ``reward_model``, ``sft`` (the policy's trunk with a new
            head) or ``random``. null: the reward model if there is one, otherwise ``sft``.
        critic_warmup: Number of iterations at the start in which only the critic is trained. An adaptive KL coefficient
            stays constant in them.
        critic_learning_rate: Peak learning rate of the critic. null: equal to ``learning_rate``.
        obs_dim: Expected width of the hidden states that the critic reads. null accepts any width.
        action_dim: Expected vocabulary size of the policy. null accepts any size.
        keys: The remaining keys are those of ``OnPolicyModule``.

    Raises:
        ConfigError: A value is out of range, settings contradict each other, or a setting has no effect.
    """

    def __init__(
        self,
        *,
        advantage: AdvantageEstimator = gae,
        gamma: Fraction = 0.99,
        gae_lambda: Fraction = 0.95,
        whiten_rewards: bool = False,
        whiten_advantages: bool | None = None,
        value_clip_range: PositiveFloat | None = 0.2,
        value_coef: NonNegativeFloat = 0.1,
        critic: Literal["separate", "shared"] = "separate",
        critic_init: Literal["reward_model", "sft", "random"] | None = None,
        critic_warmup: NonNegativeInt = 0,
        critic_learning_rate: PositiveFloat | None = None,
        obs_dim: PositiveInt | None = None,
        action_dim: PositiveInt | None = None,
        **keys: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in ADVANTAGE_KEYS.keys() | CRITIC_KEYS}
        super().__init__(advantage=advantage, **keys)
        _check_critic(critic, critic_init, critic_learning_rate)
        _check_unused(advantage, given)
        if critic_init == "reward_model" and not self.reward_sources:
            raise ConfigError(
                "stage.critic_init=reward_model requires a reward model, but the reward function uses none.",
                "Set stage.critic_init=sft or stage.reward_model=<path>.",
            )
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.whiten_rewards = whiten_rewards
        self.whiten_advantages = needs_critic(advantage) if whiten_advantages is None else whiten_advantages
        self.value_clip_range = value_clip_range
        self.value_coef = value_coef
        self.shared_critic = critic == "shared"
        self.critic_init = critic_init or ("reward_model" if self.reward_sources else "sft")
        self.critic_warmup = critic_warmup
        self.critic_learning_rate = critic_learning_rate
        self.obs_dim = obs_dim
        self.action_dim = action_dim

    # Models

    def open_models(self) -> None:
        super().open_models()
        _check_dimension("action_dim", self.action_dim, self.policy.vocab_size)
        if self.critic is not None:
            _check_dimension("obs_dim", self.obs_dim, critic_width(self.critic, self.policy.hidden_size))

    def open_critic(self) -> Critic | None:
        if not needs_critic(self.advantage):
            return None
        if self.shared_critic:
            return ScalarHead(self.policy.hidden_size)
        reward_model = next(iter(self.reward_sources), None)
        return open_separate_critic(
            self.critic_init, policy=self.source, reward_model=reward_model, tokenizer=self.tokenizer
        )

    def trainable_modules(self) -> Iterator[tuple[nn.Module, float]]:
        yield from super().trainable_modules()
        if self.critic is not None:
            rate = self.critic_learning_rate
            yield self.critic, self.learning_rate if rate is None else rate

    def preflight_checks(self, datamodule: RecordDataModule) -> Iterator[Check]:
        yield from super().preflight_checks(datamodule)
        if self.critic is not None:
            yield from critic_checks(self, datamodule, self.collector, self.critic)

    # One iteration

    def estimate_advantages(
        self, rewards: Tensor, scores: Tensor, experience: Experience
    ) -> tuple[Tensor, Tensor | None]:
        response_mask = experience.rollout.response_mask
        if self.whiten_rewards:
            rewards = masked_scale(rewards, response_mask)
        advantages, returns = super().estimate_advantages(rewards, scores, experience)
        return masked_whiten(advantages, response_mask) if self.whiten_advantages else advantages, returns

    def estimator_arguments(self, rewards: Tensor, scores: Tensor, experience: Experience) -> dict[str, Any]:
        return {
            **super().estimator_arguments(rewards, scores, experience),
            "values": experience.values,
            "gamma": self.gamma,
            "gae_lambda": self.gae_lambda,
        }

    # Updates

    @property
    def warming_up(self) -> bool:
        """Whether only the critic is trained in this iteration, and not the policy."""
        return self.critic is not None and self.iterations <= self.critic_warmup

    def frozen_modules(self) -> list[nn.Module]:
        warmup = [self.policy] if self.warming_up else []
        return [*super().frozen_modules(), *warmup]

    def compute_loss(self, minibatch: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        output, values = self.models.update_outputs(minibatch.inputs)
        policy_loss, metrics = self.policy_loss(minibatch, output)
        if values is None:
            return policy_loss, metrics
        assert minibatch.old_values is not None
        assert minibatch.returns is not None
        value_loss = clipped_value_loss(
            values,
            minibatch.old_values,
            minibatch.returns,
            minibatch.response_mask,
            clip_range=self.value_clip_range,
            loss_reduction=self.loss_reduction,
        )
        if self.warming_up:  # Keep the policy in the graph: distributed training needs a gradient of every parameter.
            policy_loss = policy_loss * 0.0
        return policy_loss + self.value_coef * value_loss, {**metrics, "loss/value_avg": value_loss}


def _check_critic(critic: str, critic_init: str | None, critic_learning_rate: float | None) -> None:
    """Refuse settings of the critic that contradict each other."""
    for name, value in {"critic_learning_rate": critic_learning_rate, "critic_init": critic_init}.items():
        if critic == "shared" and value is not None:
            raise ConfigError(
                f"stage.{name}={value} has no effect with stage.critic=shared.",
                f"Set stage.critic=separate or remove stage.{name}.",
            )


def _check_unused(advantage: AdvantageEstimator, given: dict[str, Any]) -> None:
    """Refuse settings that differ from their default and that the advantage estimator does not use."""
    declared = declared_arguments(advantage)
    unused = {name for name, argument in ADVANTAGE_KEYS.items() if argument not in declared}
    unused |= set() if needs_critic(advantage) else CRITIC_KEYS
    for name in sorted(unused):
        if not has_default(PPOModule, name, given[name]):
            raise ConfigError(
                f"stage.{name}={given[name]} has no effect: the advantage estimator {estimator_name(advantage)} "
                f"{'needs no critic' if name in CRITIC_KEYS else f'does not declare {ADVANTAGE_KEYS[name]}'}.",
                f"Set advantage=gae or remove stage.{name}.",
            )


def _check_dimension(name: str, expected: int | None, found: int) -> None:
    if expected not in (None, found):
        raise ConfigError(
            f"stage.{name} must be {found}, as in the model, got {expected}.", f"Set stage.{name}={found} or remove it."
        )
