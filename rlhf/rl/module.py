"""Base class of the on-policy stages: sampling, scoring, KL penalty and clipped policy updates."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data import PromptBatch, RecordDataModule
from rlhf.models import Frozen, ModelSource, Policy, as_sequence, disable_dropout, open_reference
from rlhf.reward_functions import RewardFunction, check_targets, read_columns
from rlhf.rl.advantage_calls import call_estimator, check_estimator
from rlhf.rl.advantages import AdvantageEstimator
from rlhf.rl.collector import Collector, check_sampling
from rlhf.rl.experience import Experience, Minibatch, minibatches, shuffled_split
from rlhf.rl.kl import KLController
from rlhf.rl.metrics import checked_columns, critic_metrics, response_columns, rollout_metrics
from rlhf.rl.models import Critic, OnPolicyModels
from rlhf.rl.objective import LossReduction, loss_reduction_function, token_rewards
from rlhf.rl.preflight import on_policy_checks
from rlhf.rl.scores import ScoreShaping
from rlhf.rl.updates import UpdateModule
from rlhf.sampling import LocalSampler, Sampler, SamplingParams
from rlhf.schema import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from rlhf.stage import Result
from rlhf.stage.check import Check
from rlhf.stage.optimizer import Schedule
from rlhf.stage.precision import scoring_context
from rlhf.stage.random_state import separate_random_state


class OnPolicyModule(UpdateModule):
    """Base class of the on-policy stages: the policy improves on its own responses by clipped updates.

    A subclass may override ``open_critic``, ``trainable_modules``, ``estimate_advantages``, ``estimator_arguments``,
    ``compute_loss`` and ``frozen_modules``.

    Args:
        policy: The model to start from, which is also the reference model. null: the SFT model of the run.
        reward_model: The reward model or models that ``reward`` uses. null: the reward model of the run.
        reward: The reward function, selected by ``reward=``.
        advantage: The advantage estimator, selected by ``advantage=``. See ``rlhf.rl.advantages``.
        num_generations: Number of responses per prompt.
        rollout_batch_size: Number of responses to sample at once, which limits the memory of sampling. null: all
            responses of a rollout.
        samples: Number of prompts in the table of samples: prompt, response, score and KL. 0 disables it.
        sample_interval: Number of iterations between two tables of samples.
        sampler: The sampler, selected by ``sampler=``. None: ``LocalSampler``.
        sampling: Sampling settings. The temperature also divides the logits of updates and of the reference model.
            None: the defaults of ``SamplingParams``.
        scores: Normalization and clipping of scores. None: the defaults of ``ScoreShaping``.
        kl: Where and how the KL penalty is applied. None: the defaults of ``KLController``.
        kl_coef: KL coefficient, in reward units per nat, or in loss units per nat with ``stage.kl.apply_to=loss``.
        clip_range: epsilon of the clipped surrogate loss (Schulman et al. 2017, section 3, arXiv:1707.06347).
        clip_range_high: epsilon for ratios above 1. A larger one lets unlikely tokens gain probability faster: Yu et
            al. 2025 (arXiv:2503.14476) use 0.28 with ``clip_range=0.2``. null: equal to ``clip_range``.
        entropy_coef: Coefficient of the entropy bonus, in loss units per nat (Mnih et al. 2016, arXiv:1602.01783).
        loss_reduction: ``token_mean`` is the mean over all tokens, ``sequence_mean`` the mean over responses of the
            mean over their tokens, and ``sequence_sum`` the mean over responses of the sum over their tokens divided by
            the constant ``stage.sampling.max_new_tokens`` (Liu et al. 2025, arXiv:2503.20783).
        ppo_epochs: Number of passes over each rollout.
        minibatch_size: Number of responses per minibatch and device. Validation evaluates as many responses at once.
        learning_rate: Peak learning rate of AdamW.
        eps: AdamW epsilon.
        schedule: Learning rate schedule: ``cosine`` or ``linear`` decay to 0, or ``constant``.
        keys: The remaining keys are those of ``UpdateModule``.

    Raises:
        ConfigError: A value is out of range, or settings contradict each other.
    """

    monitor = "val/score"
    policy: Policy
    critic: Critic | None

    def __init__(
        self,
        *,
        policy: ModelSource,
        reward_model: ModelSource | Sequence[ModelSource] | None = None,
        reward: RewardFunction,
        advantage: AdvantageEstimator,
        num_generations: PositiveInt = 1,
        rollout_batch_size: PositiveInt | None = None,
        samples: NonNegativeInt = 4,
        sample_interval: PositiveInt = 10,
        sampler: Sampler | None = None,
        sampling: SamplingParams | None = None,
        scores: ScoreShaping | None = None,
        kl: KLController | None = None,
        kl_coef: NonNegativeFloat = 0.1,
        clip_range: PositiveFloat = 0.2,
        clip_range_high: PositiveFloat | None = None,
        entropy_coef: NonNegativeFloat = 0.0,
        loss_reduction: LossReduction = "token_mean",
        ppo_epochs: PositiveInt = 4,
        minibatch_size: PositiveInt = 64,
        learning_rate: PositiveFloat = 3e-4,
        eps: PositiveFloat = 1e-5,
        schedule: Schedule = "linear",
        **keys: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, eps=eps, schedule=schedule, **keys)
        self.sampling = sampling or SamplingParams()
        check_sampling(self.sampling)
        check_estimator(advantage, num_generations)
        self.source = policy
        self.reward_sources: Sequence[ModelSource] = as_sequence(reward_model)
        self.reward = reward
        self.advantage = advantage
        self.num_generations = num_generations
        self.rollout_batch_size = rollout_batch_size
        self.samples = samples
        self.sample_interval = sample_interval
        self.sampler = sampler or LocalSampler()
        self.scores = scores or ScoreShaping()
        self.kl = kl or KLController()
        self.kl.initialize(kl_coef)
        self.loss_reduction = loss_reduction_function(loss_reduction, self.sampling.max_new_tokens)
        self.terms_are_sequences = loss_reduction != "token_mean"
        self.clip_range = clip_range
        self.clip_range_high = clip_range if clip_range_high is None else clip_range_high
        self.entropy_coef = entropy_coef
        self.ppo_epochs = ppo_epochs
        self.minibatch_size = minibatch_size

    # Models

    @classmethod
    def unused_inputs(cls, settings: Mapping[str, Any]) -> set[str]:
        return set() if settings["reward"].needs_model else {"reward_model"}

    def setup(self, stage: str) -> None:
        """Reject prompts that the reward function cannot score, before any weights are loaded."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(datamodule, RecordDataModule):
            check_targets(self.reward, datamodule, ("train", "val"))
            read_columns(self.reward.columns, datamodule, ("train", "val"))

    @property
    def response_budget(self) -> int:
        """Tokens of ``data.max_length`` that ``PromptDataModule`` reserves for the response."""
        return self.sampling.max_new_tokens

    def open_models(self) -> None:
        self.policy = Policy(disable_dropout(self.source.language_model(self.tokenizer)))
        self.reference = Frozen(open_reference(self.source, self.tokenizer)) if self.kl.is_computed else None
        self.reward.load(self.reward_sources if self.reward.needs_model else (), self.tokenizer)
        self.sampling.stop_ids(self.tokenizer, self.policy.lm)  # Report an unknown stop token before training starts.
        self.critic = self.open_critic()
        self.models = OnPolicyModels(
            self.policy,
            self.reference,
            self.critic,
            temperature=self.sampling.temperature,
            kl_estimator=self.kl.estimator,
            entropy="grad" if self.entropy_coef else "value",
        )
        self.collector = Collector(
            models=self.models,
            reward=self.reward,
            sampler=self.sampler,
            sampling=self.sampling,
            tokenizer=self.tokenizer,
            num_generations=self.num_generations,
            rollout_batch_size=self.rollout_batch_size,
            precision_context=lambda: self.trainer.precision_plugin.forward_context(),
            scoring_context=lambda: scoring_context(self.trainer.precision_plugin),
        )

    def trainable_modules(self) -> Iterator[tuple[nn.Module, float]]:
        yield self.policy, self.learning_rate

    def open_critic(self) -> Critic | None:
        """Open the critic; None: the stage has none."""
        return None

    # One iteration

    @property
    def warming_up(self) -> bool:
        """Whether the policy is not trained in this iteration."""
        return False

    def minibatches_per_iteration(self, prompts: int) -> int:
        """Return the number of minibatches of an iteration over this many prompts, over all passes."""
        return self.ppo_epochs * -(-prompts * self.num_generations // self.minibatch_size)

    @property
    def samples_to_show(self) -> int:
        """Number of samples in the table of this iteration; 0 on ranks other than 0."""
        is_due = self.trainer.is_global_zero and (self.iterations - 1) % self.sample_interval == 0
        return self.samples if is_due else 0

    def iteration(self, prompts: PromptBatch) -> Iterator[Minibatch]:
        """Run one iteration on a batch of prompts and yield the minibatches to train on."""
        self.iterations += 1

        # 1. Sample responses from the current policy.
        rollout = self.collector.sample(prompts)

        # 2. Evaluate them under the current weights, in the batches of the first pass: the first ratio is exactly 1.
        first_split = shuffled_split(len(rollout.input_ids), self.minibatch_size)
        experience = self.collector.evaluate_rollout(rollout, first_split)

        # 3. Score them, and turn shaped scores and KL into a reward for each token.
        scores, components = self.collector.score(rollout, prompts)
        columns = response_columns(experience, scores, components)
        dump = {"batch": prompts, "rollout": rollout, "first_split": first_split}
        if self.nonfinite.must_skip_rollout(self, checked_columns(columns), dump):
            scores, experience = torch.zeros_like(scores), experience.finite()
        else:
            self.scores.update(columns["scores"])
        shaped_scores = self.scores(scores, rollout.finished)
        rewards = token_rewards(shaped_scores, experience.kl, rollout.response_mask, kl_coef=self.kl.reward_coef)

        # 4. Estimate advantages and, with a critic, returns.
        advantages, returns = self.estimate_advantages(rewards, shaped_scores, experience)

        # 5. Compute the metrics and adapt the KL coefficient, unless the policy is not trained yet: its KL is 0.
        metrics = rollout_metrics(columns, self.kl, self.scores) | critic_metrics(experience, returns)
        responses = 0 if self.warming_up else len(columns["scores"])
        metrics["kl_coef"] = self.kl.update(metrics.get("objective/kl"), responses)
        self.sample_rows = self.collector.sample_rows(rollout, prompts, columns, self.samples_to_show)

        # 6. Yield minibatches for several passes over the rollout.
        yield from minibatches(
            experience,
            advantages,
            returns,
            first_split=first_split,
            passes=self.ppo_epochs,
            terms_are_sequences=self.terms_are_sequences,
            rollout_metrics=metrics,
            row_numbers=prompts.repeat(self.num_generations).rows,
        )

    def estimate_advantages(
        self, rewards: Tensor, scores: Tensor, experience: Experience
    ) -> tuple[Tensor, Tensor | None]:
        """Estimate advantages and, with a critic, returns: [batch, time] each.

        Args:
            rewards: [batch, time] reward of each token, including the KL penalty if it is applied to the reward.
            scores: [batch] shaped scores, without the KL penalty.
            experience: The evaluated rollout.
        """
        return call_estimator(self.advantage, **self.estimator_arguments(rewards, scores, experience))

    def estimator_arguments(self, rewards: Tensor, scores: Tensor, experience: Experience) -> dict[str, Any]:
        """Return the arguments that advantage estimators of this stage may declare; see ``rlhf.rl.advantages``."""
        return {
            "rewards": rewards,
            "scores": scores,
            "kl_penalty": self.kl.reward_coef * experience.kl,
            "response_mask": experience.rollout.response_mask,
            "group_size": self.num_generations,
        }

    # Validation

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        # The same draws in every validation, and training draws as if there were no validation.
        with separate_random_state(batch_idx * self.trainer.world_size + self.global_rank):
            rollout = self.collector.sample(prompts)
        experience = self.collector.evaluate_in_order(rollout, self.minibatch_size)
        metrics = {
            "score": self.collector.score(rollout, prompts)[0].mean(),
            "length": rollout.lengths.float().mean(),
            "truncated": 1 - rollout.finished.float().mean(),
        }
        if (kl := experience.kl_per_sequence) is not None:
            metrics["kl"] = kl.mean()
        self.log_val(metrics, prompts.loss_terms)

    # Pre-flight checks and result

    def preflight_checks(self, datamodule: RecordDataModule) -> Iterator[Check]:
        yield from on_policy_checks(self, datamodule, self.collector, self.iteration)

    def result(self) -> Result:
        return Result(self.policy.lm, self.tokenizer)
