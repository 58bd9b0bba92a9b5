"""The PPO stage."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf.errors import UserError
from rlhf.models import PolicyOutput, ScalarHead, ScalarModel, disable_dropout, hidden_states
from rlhf.ppo.preflight import critic_preflight
from rlhf.preflight import Check
from rlhf.rl import Experience, Minibatch, OnPolicyModule
from rlhf.rl.objective import clipped_value_loss, explained_variance, gae
from rlhf.tensors import masked_scale, masked_whiten, scatter, states_before

STARTS = ("reward_model", "sft", "random")


class PPOModule(OnPolicyModule):
    """Proximal policy optimization of a language model (Schulman et al. 2017; Ziegler et al. 2019).

    Args:
        gamma: discount a token.
        gae_lambda: of generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438).
        whiten_rewards: token rewards of a rollout around their mean, over their standard deviation, before advantages.
        whiten_advantages: advantages less their mean, over their standard deviation.
        value_clip_range: largest rewarded change of a value, reward units; null for no clipping.
        value_coef: weight of the critic's loss.
        critic: ``separate``, a model of its own, or ``shared``, a head on the policy.
        critic_init: what a critic of its own starts from: ``reward_model``, ``sft`` (the policy's weights and a new
            head) or ``fresh`` (random weights); null: the reward model where there is one, otherwise SFT.
        critic_warmup: iterations at the start in which only the critic learns.
        critic_learning_rate: null: the policy's.
        obs_dim: width of the hidden state the critic reads; null asks the model.
        action_dim: size of the vocabulary; null asks the model.
        other keys: see OnPolicyModule.
    """

    iterations: Tensor

    def __init__(
        self,
        *,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        whiten_rewards: bool = False,
        whiten_advantages: bool = True,
        value_clip_range: float | None = 0.2,
        value_coef: float = 0.1,
        critic: str = "separate",
        critic_init: str | None = None,
        critic_warmup: int = 0,
        critic_learning_rate: float | None = None,
        obs_dim: int | None = None,
        action_dim: int | None = None,
        **online: Any,
    ) -> None:
        super().__init__(**online)
        if critic not in ("separate", "shared"):
            raise UserError(f"stage.critic={critic} is neither separate nor shared", "stage.critic=separate")
        if critic_init not in (None, *STARTS):
            raise UserError(
                f"stage.critic_init={critic_init} is none of {', '.join(STARTS)}", "stage.critic_init=reward_model"
            )
        for name, value in {"critic_learning_rate": critic_learning_rate, "critic_init": critic_init}.items():
            if critic == "shared" and value is not None:
                raise UserError(
                    f"stage.{name} needs a critic of its own, but stage.critic=shared",
                    f"stage.critic=separate, or stage.{name}=null",
                )
        if critic_init == "reward_model" and not self.reward_sources:
            raise UserError(
                "stage.critic_init=reward_model, but the reward is no model",
                "stage.critic_init=sft, or stage.reward_model=<path>",
            )
        if value_clip_range is not None and value_clip_range <= 0:
            raise UserError(
                f"stage.value_clip_range={value_clip_range} lets no value move", "stage.value_clip_range=0.2, or null"
            )
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.whiten_rewards = whiten_rewards
        self.whiten_advantages = whiten_advantages
        self.value_clip_range = value_clip_range
        self.value_coef = value_coef
        self.shared_critic = critic == "shared"
        self.critic_init = critic_init or ("reward_model" if self.reward_sources else "sft")
        self.critic_warmup = critic_warmup
        self.critic_learning_rate = critic_learning_rate if critic_learning_rate is not None else self.learning_rate
        self.dims = {"obs_dim": obs_dim, "action_dim": action_dim}
        self.register_buffer("iterations", torch.zeros((), dtype=torch.long))  # begun so far

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        super().configure_model()
        self.critic: ScalarModel | ScalarHead = (
            ScalarHead(self.policy.hidden_size) if self.shared_critic else disable_dropout(self._open_critic())
        )
        width = self.policy.hidden_size if self.shared_critic else self.critic.config.get_text_config().hidden_size
        for name, there in {"obs_dim": width, "action_dim": self.policy.vocab_size}.items():
            if self.dims[name] not in (None, there):
                raise UserError(
                    f"stage.{name}={self.dims[name]}, but the model has {there}", f"stage.{name}={there}, or null"
                )

    def _open_critic(self) -> ScalarModel:
        if self.critic_init == "reward_model":
            model: ScalarModel = self.reward_sources[0].scalar_model(self.tokenizer)
            return model
        lm = self.source.language_model(self.tokenizer)
        if self.critic_init == "random":
            lm = AutoModelForCausalLM.from_config(lm.config)
        return ScalarModel(lm.base_model, ScalarHead(self.policy.hidden_size))

    def trainable_modules(self) -> Iterator[tuple[nn.Module, float]]:
        yield self.policy, self.learning_rate
        yield self.critic, self.critic_learning_rate

    def checks(self, datamodule: Any) -> Iterator[Check]:
        yield from super().checks(datamodule)
        yield from critic_preflight(self, datamodule)

    # one iteration

    def extra_estimates(
        self, scores: PolicyOutput, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor
    ) -> dict[str, Tensor]:
        return {"values": self.values_of(scores, input_ids, attention_mask, response_mask)}

    def estimate_advantages(self, rewards: Tensor, seen: Experience) -> tuple[Tensor, Tensor]:
        response_mask = seen.rollout.response_mask
        if self.whiten_rewards:
            rewards = masked_scale(rewards, response_mask)
        advantages, returns = gae(rewards, seen.values, response_mask, gamma=self.gamma, gae_lambda=self.gae_lambda)
        self._iteration["critic/explained_variance"] = explained_variance(seen.values, returns, response_mask)
        self.iterations += 1
        return masked_whiten(advantages, response_mask) if self.whiten_advantages else advantages, returns

    # learning

    def compute_loss(self, part: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.policy_output(part)
        warming_up = bool(self.iterations <= self.critic_warmup)
        values = self.values_of(scores, part.input_ids, part.attention_mask, part.response_mask, detach=warming_up)
        value_loss = clipped_value_loss(
            values,
            part.old_values,
            part.returns,
            part.response_mask,
            clip_range=self.value_clip_range,
            loss_reduction=self.loss_reduction,
        )
        policy_loss, numbers = self.policy_loss(part, scores)
        if warming_up:  # the policy takes part with weight 0: every rank then has a gradient for every parameter
            self._dropped = [self.policy]
            policy_loss = policy_loss * 0.0
        return policy_loss + self.value_coef * value_loss, {**numbers, "loss/value_avg": value_loss}

    def values_of(
        self,
        scores: PolicyOutput,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        *,
        detach: bool = False,
    ) -> Tensor:
        """The critic's values before the answer tokens, [batch, time]; ``detach`` keeps a shared trunk out of it."""
        if self.shared_critic:
            hidden = scores.hidden.detach() if detach else scores.hidden
            return scatter(self.critic(states_before(hidden, response_mask)), response_mask)
        hidden = hidden_states(self.critic.trunk, input_ids, attention_mask)
        return scatter(self.critic.values(states_before(hidden, response_mask)), response_mask)
