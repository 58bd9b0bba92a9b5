"""What the stages that learn from preferences have in common."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlhf.data import Batch, SequenceBatch
from rlhf.dpo.preflight import checks
from rlhf.dpo.ref_logprobs import ReferenceLogprobs, model_key
from rlhf.errors import UserError
from rlhf.models import Frozen, ModelSource, Policy, disable_dropout
from rlhf.preflight import Check
from rlhf.stage import Result, StageModule
from rlhf.tensors import masked_mean

# numbers to log, each group with how many terms its numbers are means over
Numbers: TypeAlias = list[tuple[int, dict[str, Tensor]]]
RANGES = {
    "label_smoothing": (0.0, 0.5),
    "target_margin": (0.0, float("inf")),
    "desirable_weight": (0.0, float("inf")),
    "undesirable_weight": (0.0, float("inf")),
}


class PreferenceModule(StageModule):
    """A policy that learns which answers are better, by default held by a frozen reference.

    Args:
        policy: what to start from, and the reference; null: the run's SFT model.
        loss: the loss, a function of ``rlhf.dpo.objective`` with its own numbers filled in: ``loss=ipo``.
        beta: strength of the pull to the reference; reward units per nat. Some losses say otherwise.
        reference_free: leave the reference out: the losses read log pi. No second model is loaded.
        length_normalized: log-probs of answers are means a token instead of sums.
        sft_coef: weight of the SFT term, the negative log-likelihood a token of the better answers; loss units per nat.
        precompute_ref_logprobs: score all answers with the reference, if there is one, before training instead of at
            every step.
        ref_logprobs_cache: folder where precomputed scores are kept, by model and data: a sweep computes them once;
            null for none.
        optimizer keys: see StageModule.
    """

    monitor = "val/rewards/accuracies"

    def __init__(
        self,
        *,
        policy: ModelSource,
        loss: Callable[..., Tensor],
        beta: float = 0.1,
        reference_free: bool = False,
        length_normalized: bool = False,
        sft_coef: float = 0.0,
        precompute_ref_logprobs: bool = True,
        ref_logprobs_cache: str | None = None,
        **optimizer: Any,
    ) -> None:
        super().__init__(**optimizer)
        self.source = policy
        self.loss = loss
        self.beta = beta
        self.reference_free = reference_free
        self.length_normalized = length_normalized
        self.sft_coef = sft_coef
        self.precompute_ref_logprobs = precompute_ref_logprobs
        self.ref_logprobs_cache = ref_logprobs_cache
        self.policy: Policy | None = None
        self.reference: Frozen | None = None
        self._check_numbers()
        self._check_switches()

    def _check_numbers(self) -> None:
        if self.beta <= 0:
            raise UserError(f"stage.beta={self.beta} is not above 0", "stage.beta=0.1")
        if self.sft_coef < 0:
            raise UserError(f"stage.sft_coef={self.sft_coef} is below 0", "stage.sft_coef=0")
        for name, value in getattr(self.loss, "keywords", {}).items():
            low, high = RANGES.get(name, (-float("inf"), float("inf")))
            if not low <= value < high:
                raise UserError(
                    f"stage.loss.{name}={value} is not from {low:g} to below {high:g}",
                    f"stage.loss.{name}={0.1 if high < 1 else 1.0}",
                )

    def _check_switches(self) -> None:
        """Refuse a setting that the loss is not defined for."""
        loss: Any = getattr(self.loss, "func", self.loss)  # without its numbers
        for switch, needed in getattr(loss, "needs", {}).items():
            if getattr(self, switch) != needed:
                needed_word, given_word = str(needed).lower(), str(not needed).lower()
                raise UserError(
                    f"stage.{switch}={given_word} contradicts stage.loss._target_={loss.__module__}."
                    f"{loss.__qualname__}, which is defined for {switch}={needed_word} only",
                    f"stage.{switch}={needed_word}, or another loss: loss=sigmoid",
                )

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = self._open()
            if not self.reference_free:
                # opened from the same place, so that a resumed run keeps the first reference
                self.reference = Frozen(self._open())

    def _open(self) -> Policy:
        return Policy(disable_dropout(self.source.language_model(self.tokenizer)))

    # the reference

    def on_fit_start(self) -> None:
        if self.reference is None or not self.precompute_ref_logprobs:
            return
        data, folder, key = self.trainer.datamodule, None, ""
        if self.ref_logprobs_cache is not None and not self.trainer.fast_dev_run:
            arithmetic = f"{self.trainer.precision} on {self.device.type}"
            folder, key = Path(self.ref_logprobs_cache), model_key(self.reference.model.lm, arithmetic)
        known = ReferenceLogprobs(self._score_by_reference, data.eval_batch_size, folder, key)
        for split in ("train", "val"):
            if data.records(split):
                known.fill(data.encoded(split), split)

    def _score_by_reference(self, texts: SequenceBatch) -> Tensor:
        return self.compute_ref_logprobs(self.transfer_batch_to_device(texts, self.device, 0))

    @torch.no_grad()
    def compute_ref_logprobs(self, texts: SequenceBatch) -> Tensor:
        """Summed log-probs of the answers under the reference, [batch], nats."""
        with self.trainer.precision_plugin.forward_context():
            logprobs: Tensor = self.reference(texts.input_ids, texts.attention_mask, texts.response_mask).logprobs.sum(
                dim=1
            )
            return logprobs

    # the loss

    @abstractmethod
    def compare(self, batch: Any) -> tuple[Tensor, Tensor, Numbers]:
        """Preference loss and SFT term of a batch, [] each, and the numbers to log."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        preference, nll, groups = self.compare(batch)
        self.log_train({"train/loss": preference + self.sft_coef * nll, "nll": nll})
        for terms, numbers in groups:
            if terms:
                self.log_train(numbers)
        # each mean has its own share of the step: the terms of one are pairs or answers, those of the other tokens
        return preference * batch.loss_weight + self.sft_coef * nll * batch.sft_loss_weight

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        preference, nll, groups = self.compare(batch)
        self.log_val({"loss": preference + self.sft_coef * nll}, batch.loss_terms)
        for terms, numbers in [(batch.sft_terms, {"nll": nll}), *groups]:
            self.log_val(numbers, terms)

    def response_logprobs(self, texts: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Summed log-probs of the answers under the policy, [batch], and their mean entropy a token, []; nats."""
        scores = self.policy(texts.input_ids, texts.attention_mask, texts.response_mask)
        return scores.logprobs.sum(dim=1), masked_mean(scores.entropy, texts.response_mask)

    def loss_inputs(self, logprobs: Tensor, reference: Tensor | None, texts: SequenceBatch) -> Tensor:
        """What the policy says of each answer by the stage's switches, [batch], nats or nats a token.

        Args:
            logprobs: [batch] summed log-probs of the answers under the policy, nats.
            reference: [batch] the same under the reference; None where there is none.
            texts: the answers, for their lengths.
        """
        said = logprobs if reference is None else logprobs - reference
        return said / lengths(texts) if self.length_normalized else said

    def checks(self, datamodule: Any) -> Iterator[Check]:
        return checks(self, datamodule)

    def result(self) -> Result:
        return Result(self.policy.lm, self.tokenizer)


def lengths(texts: SequenceBatch) -> Tensor:
    """[batch] tokens of each answer that are learned, 1 at least."""
    return texts.response_mask.sum(dim=1).clamp(min=1)
