"""What the stages that learn from their own answers share: sampling, judging, the price of KL, clipped updates."""

import logging
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data import PromptBatch
from rlhf.errors import UserError
from rlhf.models import Frozen, ModelSource, Policy, PolicyOutput, disable_dropout, kl_divergence
from rlhf.preflight import Check
from rlhf.reward_functions import RewardFunction, ScoringBatch
from rlhf.rl.experience import Experience, Minibatch, cut, partition
from rlhf.rl.kl import ESTIMATORS, FULL, KLController
from rlhf.rl.metrics import rollout_metrics, update_metrics
from rlhf.rl.objective import clipped_policy_loss, token_rewards
from rlhf.rl.preflight import checks
from rlhf.rl.scores import ScoreShaping
from rlhf.rl.update_limits import UpdateLimits
from rlhf.sampling import Rollout, SamplingParams, generate
from rlhf.stage import Result, StageModule
from rlhf.tensors import masked_mean, sequence_mean

log = logging.getLogger(__name__)
LOSS_REDUCTIONS = {"token_mean": masked_mean, "sequence_mean": sequence_mean}


class OnPolicyModule(StageModule):
    """A policy that answers prompts, is rewarded, and improves on its answers by clipped updates.

    Args:
        policy: what to start from, and the reference; null: the run's SFT model.
        reward_model: what judges the answers where ``reward`` reads a model, or several; null: the run's.
        reward: where rewards come from; ``reward=`` chooses.
        sampling: how answers are drawn; its temperature also divides the logits of the update.
        scores: how scores are normalised, scaled and clipped.
        kl: where the KL to the reference is charged, how it is measured, and whether its price adapts.
        limits: bounds on an update beside clip_range.
        kl_coef: price of leaving the reference, reward units per nat in the reward, loss units per nat in the loss.
        clip_range: epsilon of the clipped surrogate, dimensionless (Schulman et al. 2017, arXiv:1707.06347).
        entropy_coef: bonus for the entropy of the policy, loss units per nat (Mnih et al. 2016, arXiv:1602.01783).
        loss_reduction: what counts alike in the loss, ``token`` or ``sequence`` (an answer).
        ppo_epochs: passes over a rollout.
        minibatch_size: answers of a rollout in a training batch, per device.
        optimizer keys: see StageModule.
    """

    monitor = "val/score"
    num_generations = 1

    def __init__(
        self,
        *,
        policy: ModelSource,
        reward_model: Any,
        reward: RewardFunction,
        sampling: SamplingParams,
        scores: ScoreShaping,
        kl: KLController,
        limits: UpdateLimits,
        kl_coef: float = 0.05,
        clip_range: float = 0.2,
        entropy_coef: float = 0.0,
        loss_reduction: str = "token_mean",
        ppo_epochs: int = 4,
        minibatch_size: int = 64,
        **optimizer: Any,
    ) -> None:
        super().__init__(**optimizer)
        if sampling.temperature == 0:
            raise UserError(
                "stage.sampling.temperature=0 explores nothing: learning from samples needs some",
                "stage.sampling.temperature=0.7",
            )
        if loss_reduction not in LOSS_REDUCTIONS:
            raise UserError(
                f"stage.loss_reduction={loss_reduction} is neither token_mean nor sequence_mean",
                "stage.loss_reduction=token_mean",
            )
        for name, least in {"ppo_epochs": ppo_epochs, "minibatch_size": minibatch_size}.items():
            if least < 1:
                raise UserError(f"stage.{name}={least} leaves nothing to learn from", f"stage.{name}=1")
        if clip_range <= 0:
            raise UserError(f"stage.clip_range={clip_range} lets no ratio move", "stage.clip_range=0.2")
        self.source = policy
        self.reward_sources: Sequence[Any] = _listed(reward_model)
        self.reward = reward
        self.sampling = sampling
        self.scores = scores
        self.kl = kl
        self.kl.start(kl_coef)
        self.limits = limits
        self.clip_range = clip_range
        self.entropy_coef = entropy_coef
        self.loss_reduction = LOSS_REDUCTIONS[loss_reduction]
        self.ppo_epochs = ppo_epochs
        self.minibatch_size = minibatch_size
        self.policy: Policy | None = None
        self._updates: dict[str, list[Tensor]] = defaultdict(list)
        self._iteration: dict[str, Any] = {}
        self._stopped = False  # no more learning from this rollout
        self._dropped: list[nn.Module] = []  # parts whose gradient the next optimizer step leaves out

    # the models

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        self.policy, reference = (Policy(disable_dropout(self.source.language_model(self.tokenizer))) for _ in range(2))
        self.reference = Frozen(reference)
        self.reward.load(self.reward_sources if self.reward.needs_model else (), self.tokenizer)
        self.stops = self.sampling.stop_ids(self.tokenizer)
        if self.sampling.top_k or self.sampling.top_p < 1:
            log.warning(
                "stage.sampling.top_k and top_p change what is sampled, but log-probs, ratio and KL are those of the "
                "whole distribution: answers come from a narrower policy than the one that is updated"
            )

    # one iteration

    def minibatches_of(self, prompts: int) -> int:
        """How many minibatches an iteration over so many prompts has, all passes together."""
        return self.ppo_epochs * -(-prompts * self.num_generations // self.minibatch_size)

    def iteration(self, prompts: PromptBatch) -> Iterator[Minibatch]:
        """One iteration: answer the prompts, judge the answers, then hand them out a few times to learn from."""
        rollout = self.sample(prompts)
        parts = partition(len(rollout.input_ids), self.minibatch_size)  # the first pass's minibatches

        seen = self.evaluate_rollout(rollout, parts)
        raw, single = self.score(rollout, prompts)  # [batch] reward units
        self.scores.update(self.all_gather(raw).flatten())
        scores = self.scores(raw, rollout.finished)
        kl_coef = 0.0 if self.kl.in_loss else float(self.kl.coef)
        rewards = token_rewards(scores, seen.kl, rollout.response_mask, kl_coef=kl_coef)
        self._iteration = rollout_metrics(seen, raw, rewards, self.kl, self.scores)
        self._iteration.update({f"reward/{name}": values.mean() for name, values in single.items()})
        advantages, returns = self.estimate_advantages(rewards, seen)
        kl_per_sequence = self.all_gather(seen.kl_per_sequence)
        self.kl.steer(kl_per_sequence.mean(), kl_per_sequence.numel())

        tensors = (seen.logprobs, seen.ref_logprobs, advantages, seen.values, returns)
        for each_pass in range(self.ppo_epochs):
            parts = parts if each_pass == 0 else partition(len(rollout.input_ids), self.minibatch_size)
            for number, rows in enumerate(parts):
                part = Minibatch(*cut(rollout, rows, *tensors), by_sequence=self.loss_reduction is sequence_mean)
                if each_pass == number == 0:
                    part.fresh = int(rollout.attention_mask.sum()), len(rollout.input_ids)
                part.last = each_pass == self.ppo_epochs - 1 and number == len(parts) - 1
                yield part

    def sample(self, prompts: PromptBatch) -> Rollout:
        """Sample answers to every prompt from the present policy; those to one prompt stand together."""
        repeated = [input_ids for input_ids in prompts.input_ids for _ in range(self.num_generations)]
        with self.trainer.precision_plugin.forward_context():
            return generate(self.policy.lm, repeated, self.sampling, self.stops)

    @torch.no_grad()
    def evaluate_rollout(self, rollout: Rollout, parts: list[Tensor]) -> Experience:
        """What the models say of sampled tokens, before they learn from them.

        It is taken in the parts that the first pass will train on: equal shapes give equal rounding, so the first
        ratio is exactly 1.
        """
        found: dict[str, Tensor] = {}
        with self.trainer.precision_plugin.forward_context():
            for rows in parts:
                for name, piece in self.evaluate_rows(*cut(rollout, rows)).items():
                    whole = found.setdefault(name, torch.zeros_like(rollout.input_ids, dtype=torch.float))
                    whole[rows.to(whole.device), : piece.shape[1]] = piece
        return Experience(rollout, **found)

    def evaluate_rows(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> dict[str, Tensor]:
        """A part of ``evaluate_rollout``: [rows, time] each."""
        scores = self.policy(input_ids, attention_mask, response_mask, self.sampling.temperature)
        reference = self.reference(input_ids, attention_mask, response_mask, self.sampling.temperature)
        return {
            "logprobs": scores.logprobs,
            "ref_logprobs": reference.logprobs,
            "kl": self.divergence(scores, reference.logprobs, response_mask, reference),
            **self.extra_estimates(scores, input_ids, attention_mask, response_mask),
        }

    def extra_estimates(
        self, scores: PolicyOutput, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor
    ) -> dict[str, Tensor]:
        """What a stage wants to know beside that: a critic's values."""
        return {}

    def divergence(
        self, scores: PolicyOutput, ref_logprobs: Tensor, response_mask: Tensor, reference: PolicyOutput | None
    ) -> Tensor:
        """KL to the reference at each token by the configured estimator: [batch, time], nats; carries a gradient."""
        if self.kl.estimator == FULL:
            return kl_divergence(
                self.policy,
                scores.hidden,
                self.reference.model,
                reference.hidden,
                response_mask,
                self.sampling.temperature,
            )
        # on padding both are 0, so no estimator sees anything else
        return ESTIMATORS[self.kl.estimator](
            torch.where(response_mask, scores.logprobs, 0.0), torch.where(response_mask, ref_logprobs, 0.0)
        )

    @torch.no_grad()
    def score(self, rollout: Rollout, prompts: PromptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The reward of each answer, [batch], reward units, and the single rewards it is made of."""
        repeated = [prompt for prompt in prompts.prompts for _ in range(self.num_generations)]
        answers = ScoringBatch(
            rollout.input_ids,
            rollout.attention_mask,
            [prompt.raw_text for prompt in repeated],
            rollout.decode(self.tokenizer),
            [prompt.target for prompt in repeated],
        )
        with self.trainer.precision_plugin.forward_context():
            return self.reward.score_with_components(answers)

    @abstractmethod
    def estimate_advantages(self, rewards: Tensor, seen: Experience) -> tuple[Tensor, Tensor | None]:
        """Advantages, and returns where there is a critic: [batch, time] each.

        Args:
            rewards: [batch, time] reward units, with the price of KL where the reward carries it.
            seen: the rollout and what the models say of it.
        """

    # learning

    def training_step(self, part: Minibatch, batch_idx: int) -> Tensor:
        if part.first:
            self._stopped = False
        if self._stopped:
            return self.zero_loss()
        loss, numbers = self.compute_loss(part)
        if self._exceeds_limits(numbers):
            return self.zero_loss()
        self._note({**numbers, "policy/skipped": torch.zeros_like(loss), "train/loss": loss})
        return loss * part.loss_weight

    def compute_loss(self, part: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a minibatch, [], and the numbers to log, ``policy/ratio`` and ``policy/approxkl_avg`` among them."""
        scores = self.policy_output(part)
        return self.policy_loss(part, scores)

    def policy_output(self, part: Minibatch) -> PolicyOutput:
        """The policy's scores of the answer tokens."""
        return self.policy(
            part.input_ids,
            part.attention_mask,
            part.response_mask,
            self.sampling.temperature,
            entropy_grad=self.entropy_coef != 0,
        )

    def policy_loss(self, part: Minibatch, scores: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate, with the entropy bonus and the price of KL where the loss carries them."""
        surrogate = clipped_policy_loss(
            scores.logprobs,
            part.old_logprobs,
            part.advantages,
            part.response_mask,
            clip_range=self.clip_range,
            clip_range_high=self.limits.clip_range_high,
            dual_clip=self.limits.dual_clip,
            loss_reduction=self.loss_reduction,
        )
        loss = surrogate
        high = self.limits.clip_range_high or self.clip_range
        numbers = update_metrics(part, scores, low=self.clip_range, high=high)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * self.loss_reduction(scores.entropy, part.response_mask)
        if self.kl.in_loss:
            kl = self.loss_reduction(self._present_divergence(part, scores), part.response_mask)
            loss = loss + float(self.kl.coef) * kl
            numbers["loss/kl_avg"] = kl
        return loss, {"loss/policy_avg": surrogate, **numbers}

    def _present_divergence(self, part: Minibatch, scores: PolicyOutput) -> Tensor:
        reference = None
        if self.kl.estimator == FULL:
            reference = self.reference(
                part.input_ids, part.attention_mask, part.response_mask, self.sampling.temperature
            )
        return self.divergence(scores, part.ref_logprobs, part.response_mask, reference)

    def _exceeds_limits(self, numbers: dict[str, Tensor]) -> bool:
        """True if this minibatch must not be learned from; the same answer on every rank."""
        limits = self.limits
        if limits.stop_kl_per_token is not None:
            self._stopped = self._mean_over_ranks(numbers["policy/approxkl_avg"]) > limits.stop_kl_per_token
        blown_up = limits.skip_ratio is not None and self._mean_over_ranks(numbers["policy/ratio"]) > limits.skip_ratio
        return self._stopped or blown_up

    def _mean_over_ranks(self, value: Tensor) -> float:
        return float(self.trainer.strategy.reduce(value.detach(), reduce_op="mean"))

    def zero_loss(self) -> Tensor:
        """A loss without effect: the optimizer step that follows leaves every parameter and its moments alone."""
        parts = [part for part, _ in self.trainable_modules()]
        self._dropped = parts
        self._note({"policy/skipped": torch.ones((), device=self.device)})
        learned = [p for part in parts for p in part.parameters() if p.requires_grad]
        return torch.stack([(p.flatten()[0] * 0.0).float() for p in learned]).sum()

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        rollout = self.sample(prompts)
        seen = self.evaluate_rollout(rollout, [torch.arange(len(rollout.input_ids))])
        self.log_val(
            {
                "score": self.score(rollout, prompts)[0].mean(),
                "kl": seen.kl_per_sequence.mean(),
                "length": rollout.lengths.float().mean(),
            },
            len(prompts.input_ids),
        )

    # numbers

    def _note(self, numbers: dict[str, Tensor]) -> None:
        for name, value in numbers.items():
            self._updates[name].append(value.detach())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for part in self._dropped:
            for parameter in part.parameters():
                parameter.grad = None
        self._dropped = []
        for name, value in self.optimizer_metrics(optimizer).items():
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


def _listed(sources: Any) -> Sequence[Any]:
    """One source or several, as a sequence; none for null."""
    if sources is None:
        return ()
    return sources if isinstance(sources, list | tuple) else (sources,)
