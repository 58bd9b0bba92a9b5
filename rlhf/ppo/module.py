"""The PPO stage."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.checks import Check
from rlhf.data import PromptBatch
from rlhf.errors import UserError
from rlhf.models import Frozen, ModelSource, Policy, ScalarHead, ScalarModel, hidden_states, switch_off_dropout
from rlhf.ppo.checks import checks
from rlhf.ppo.experience import Minibatch, partition
from rlhf.ppo.objective import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    policy_ratio,
    token_rewards,
)  # fmt: skip
from rlhf.ppo.scores import ScoreShaping
from rlhf.rollout import Rollout, Sampling, repeated_share, roll_out
from rlhf.stage import Result, StageModule
from rlhf.tensors import masked_mean, masked_sum, masked_whiten, scatter, states_before


class PPOModule(StageModule):
    """Proximal policy optimization of a language model (Schulman et al. 2017; Ziegler et al. 2019).

    Args:
        policy: what to start from, and the reference; null: the run's SFT model.
        reward_model: what judges the answers; null: the run's reward model.
        sampling: how answers are drawn; its temperature also divides the logits of the update.
        scores: how scores are normalised, scaled and clipped.
        clip_range: epsilon of the clipped surrogate, dimensionless.
        value_clip_range: largest rewarded change of a value, reward units; null for no clipping.
        value_coef: weight of the critic's loss.
        kl_coef: price of leaving the reference, reward units per nat.
        gamma: discount a token.
        gae_lambda: of generalized advantage estimation.
        ppo_epochs: passes over a rollout.
        minibatch_size: answers of a rollout in a training batch, per device.
        critic: ``separate``, a model of its own that starts as the reward model, or ``shared``, a head on the policy.
        critic_learning_rate: null: the policy's.
        obs_dim: width of the hidden state the critic reads; null asks the model.
        action_dim: size of the vocabulary; null asks the model.
        optimizer keys: see StageModule.
    """

    figure_of_merit = "val/score"

    def __init__(
        self, *, policy: ModelSource, reward_model: Any, sampling: Sampling, scores: ScoreShaping,
        clip_range: float = 0.2, value_clip_range: float | None = 0.2, value_coef: float = 0.1, kl_coef: float = 0.05,
        gamma: float = 0.99, gae_lambda: float = 0.95, ppo_epochs: int = 4, minibatch_size: int = 64,
        critic: str = "separate", critic_learning_rate: float | None = None, obs_dim: int | None = None,
        action_dim: int | None = None, **optimizer: Any,
    ) -> None:  # fmt: skip
        super().__init__(**optimizer)
        if sampling.temperature == 0:
            raise UserError(
                "stage.sampling.temperature=0 explores nothing: PPO has to sample", "stage.sampling.temperature=0.7"
            )
        if critic not in ("separate", "shared"):
            raise UserError(f"stage.critic={critic} is neither separate nor shared", "stage.critic=separate")
        if critic == "shared" and critic_learning_rate is not None:
            raise UserError("stage.critic_learning_rate needs a critic of its own, but stage.critic=shared",
                            "stage.critic=separate, or stage.critic_learning_rate=null")  # fmt: skip
        self.source = policy
        self.reward_source = reward_model
        self.sampling = sampling
        self.scores = scores
        self.clip_range = clip_range
        self.value_clip_range = value_clip_range
        self.value_coef = value_coef
        self.kl_coef = kl_coef
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.ppo_epochs = ppo_epochs
        self.minibatch_size = minibatch_size
        self.shared_critic = critic == "shared"
        self.critic_learning_rate = critic_learning_rate if critic_learning_rate is not None else self.learning_rate
        self.dims = {"obs_dim": obs_dim, "action_dim": action_dim}
        self.policy: Policy | None = None
        self._updates: dict[str, list[Tensor]] = defaultdict(list)
        self._iteration: dict[str, Any] = {}

    # the four models

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        self.policy, reference = (
            Policy(switch_off_dropout(self.source.language_model(self.tokenizer))) for _ in range(2)
        )
        self.reference = Frozen(reference)
        self.reward_model = Frozen(switch_off_dropout(self._scalar_model()))
        self.critic: ScalarModel | ScalarHead = (
            ScalarHead(self.policy.width) if self.shared_critic else switch_off_dropout(self._scalar_model())
        )
        width = self.policy.width if self.shared_critic else self.critic.config.get_text_config().hidden_size
        for name, there in {"obs_dim": width, "action_dim": self.policy.vocab_size}.items():
            if self.dims[name] not in (None, there):
                raise UserError(
                    f"stage.{name}={self.dims[name]}, but the model has {there}", f"stage.{name}={there}, or null"
                )

    def _scalar_model(self) -> ScalarModel:
        return self.reward_source.scalar_model(self.tokenizer)

    def trained_parts(self) -> Iterator[tuple[nn.Module, float]]:
        yield self.policy, self.learning_rate
        yield self.critic, self.critic_learning_rate

    # one iteration

    def minibatches_of(self, prompts: int) -> int:
        """How many minibatches an iteration over so many prompts has, all passes together."""
        return self.ppo_epochs * -(-prompts // self.minibatch_size)

    def iteration(self, prompts: PromptBatch) -> Iterator[Minibatch]:
        """One PPO iteration: answer the prompts, judge the answers, then hand them out a few times to learn from."""
        rollout = self.answer(prompts)
        parts = partition(len(rollout.tokens), self.minibatch_size)  # the first pass's minibatches

        logprobs, reference_logprobs, values = self.look_back(rollout, parts)  # [batch, time] each
        raw = self.score(rollout)  # [batch] reward units
        self.scores.update(self.all_gather(raw).flatten())
        scores = self.scores(raw, rollout.finished)
        rewards = token_rewards(scores, logprobs, reference_logprobs, rollout.answer, kl_coef=self.kl_coef)
        advantages, returns = gae(rewards, values, rollout.answer, gamma=self.gamma, gae_lambda=self.gae_lambda)
        self._iteration = self._rollout_numbers(rollout, raw, rewards, logprobs, reference_logprobs)
        self._iteration["val/explained_variance"] = explained_variance(values, returns, rollout.answer)
        advantages = masked_whiten(advantages, rollout.answer)

        tensors = (rollout.tokens, rollout.mask, rollout.answer, logprobs, values, advantages, returns)
        for each_pass in range(self.ppo_epochs):
            parts = parts if each_pass == 0 else partition(len(rollout.tokens), self.minibatch_size)
            for number, rows in enumerate(parts):
                part = Minibatch(*_cut(tensors, rows))
                if each_pass == number == 0:
                    part.fresh = int(rollout.mask.sum()), len(rollout.tokens)
                part.last = each_pass == self.ppo_epochs - 1 and number == len(parts) - 1
                yield part

    def answer(self, prompts: PromptBatch) -> Rollout:
        """Sample an answer to every prompt from the present policy."""
        with self.trainer.precision_plugin.forward_context():
            return roll_out(self.policy.lm, prompts.tokens, self.sampling, self.tokenizer.eos_token_id)

    @torch.no_grad()
    def look_back(self, rollout: Rollout, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of policy and reference, and values, of sampled tokens: [batch, time] each.

        They are taken in the parts that the first pass will train on: equal shapes give equal rounding, so the first
        ratio is exactly 1.
        """
        found = [torch.zeros_like(rollout.tokens, dtype=torch.float) for _ in range(3)]
        with self.trainer.precision_plugin.forward_context():
            for rows in parts:
                tokens, mask, answer = _cut((rollout.tokens, rollout.mask, rollout.answer), rows)
                scores, values = self.look(tokens, mask, answer)
                reference = self.reference(tokens, mask, answer, self.sampling.temperature)
                for whole, part in zip(found, (scores.logprobs, reference.logprobs, values), strict=True):
                    whole[rows.to(whole.device), : part.shape[1]] = part
        return found[0], found[1], found[2]

    def look(self, tokens: Tensor, mask: Tensor, answer: Tensor) -> tuple[Any, Tensor]:
        """The policy's scores of the answer tokens, and the critic's values before them, [batch, time]."""
        scores = self.policy(tokens, mask, answer, self.sampling.temperature)
        if self.shared_critic:
            return scores, scatter(self.critic(states_before(scores.hidden, answer)), answer)
        hidden = hidden_states(self.critic.trunk, tokens, mask)
        return scores, scatter(self.critic.values(states_before(hidden, answer)), answer)

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Tensor:
        """The reward model's score of each answer, [batch], reward units."""
        with self.trainer.precision_plugin.forward_context():
            parts = range(0, len(rollout.tokens), self.minibatch_size)
            pieces = [slice(i, i + self.minibatch_size) for i in parts]
            return torch.cat([self.reward_model(rollout.tokens[piece], rollout.mask[piece]) for piece in pieces])

    # learning

    def training_step(self, part: Minibatch, batch_idx: int) -> Tensor:
        scores, values = self.look(part.tokens, part.mask, part.answer)
        policy_loss = clipped_policy_loss(
            scores.logprobs, part.old_logprobs, part.advantages, part.answer, clip_range=self.clip_range
        )
        value_loss = clipped_value_loss(
            values, part.old_values, part.returns, part.answer, clip_range=self.value_clip_range
        )
        self._note_update(part, scores, values, policy_loss, value_loss)
        return (policy_loss + self.value_coef * value_loss) * part.share

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        rollout = self.answer(prompts)
        every = [torch.arange(len(rollout.tokens))]
        logprobs, reference_logprobs, _ = self.look_back(rollout, every)
        self.log_val(
            {
                "score": self.score(rollout).mean(),
                "kl": masked_sum(logprobs - reference_logprobs, rollout.answer).mean(),
                "length": rollout.lengths.float().mean(),
                "truncated": 1 - rollout.finished.float().mean(),
            },
            len(rollout.tokens),
        )
        if batch_idx == 0 and not self.trainer.sanity_checking:
            answers = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rollout.answers()[:4]]
            self.show_samples([(p.source, a) for p, a in zip(prompts.prompts, answers, strict=False)])

    # numbers

    @torch.no_grad()
    def _rollout_numbers(
        self, rollout: Rollout, raw: Tensor, rewards: Tensor, logprobs: Tensor, reference_logprobs: Tensor
    ) -> dict[str, Any]:
        kl = masked_sum(logprobs - reference_logprobs, rollout.answer)
        return {
            "objective/kl": kl.mean(),
            "objective/entropy": -masked_sum(logprobs, rollout.answer).mean(),
            "objective/scores": raw.mean(),
            "objective/scores_std": self.scores.std.float(),
            "objective/non_score_reward": -self.kl_coef * kl.mean(),
            "objective/rlhf_reward": rewards.sum(dim=1).mean(),
            "response/length": rollout.lengths.float().mean(),
            "response/truncated": 1 - rollout.finished.float().mean(),
            "response/repetition": repeated_share(rollout.answers()),
            "kl_coef": self.kl_coef,
        }

    @torch.no_grad()
    def _note_update(
        self, part: Minibatch, scores: Any, values: Tensor, policy_loss: Tensor, value_loss: Tensor
    ) -> None:
        ratio = policy_ratio(scores.logprobs, part.old_logprobs, part.answer)
        change = scores.logprobs - part.old_logprobs
        for name, value in {
            "loss/policy_avg": policy_loss,
            "loss/value_avg": value_loss,
            "policy/approxkl_avg": 0.5 * masked_mean(change.square(), part.answer),
            "policy/clipfrac_avg": masked_mean(((ratio - 1).abs() > self.clip_range).float(), part.answer),
            "policy/entropy_avg": masked_mean(scores.entropy, part.answer),
            "val/ratio": masked_mean(ratio, part.answer),
            "train/loss": policy_loss + self.value_coef * value_loss,
        }.items():
            self._updates[name].append(value.detach())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, value in self.optimizer_numbers(optimizer).items():
            self._updates[name].append(torch.as_tensor(value))

    def on_train_batch_end(self, outputs: Any, part: Minibatch, batch_idx: int) -> None:
        if part.last:
            self._log_iteration()

    def on_train_end(self) -> None:
        if self._updates:  # max_steps ended training within an iteration
            self._log_iteration()

    def _log_iteration(self) -> None:
        """Log the numbers of a rollout and of the updates it has served for, once: ``self.log`` would repeat them."""
        updates = {name: torch.stack(values).float().mean() for name, values in self._updates.items()}
        self._updates.clear()
        numbers = {**self._iteration, **updates, **self.throughput()}
        self.numbers = {name: float(value) for name, value in numbers.items()}
        for logger in self.loggers:
            logger.log_metrics(self.numbers, step=self.global_step)

    def checks(self, datamodule: Any) -> Iterator[Check]:
        return checks(self, datamodule)

    def result(self) -> Result:
        return Result(self.policy.lm, self.tokenizer)


def _cut(tensors: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    """Some rows of [batch, time] tensors, without the columns that are padding in all of them; mask is the second."""
    rows = rows.to(tensors[0].device)
    width = int(tensors[1][rows].sum(dim=1).max())
    return tuple(tensor[rows, :width] for tensor in tensors)
