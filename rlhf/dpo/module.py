"""The DPO stage."""

from typing import Any

import torch
from torch import Tensor

from rlhf.data import PairBatch
from rlhf.dpo.objective import sigmoid_loss
from rlhf.errors import UserError
from rlhf.models import Frozen, ModelSource, Policy, switch_off_dropout
from rlhf.stage import Result, StageModule
from rlhf.tensors import masked_mean


class DPOModule(StageModule):
    """Moves the policy towards chosen answers and away from rejected ones, held by a frozen reference.

    Args:
        policy: what to start from, and the reference; null: the run's SFT model.
        beta: strength of the pull to the reference; reward units per nat.
        precompute_reference: score all pairs with the reference once, before training, instead of at every step.
        optimizer keys: see StageModule.
    """

    figure_of_merit = "val/rewards/accuracies"

    def __init__(
        self, *, policy: ModelSource, beta: float = 0.1, precompute_reference: bool = True, **optimizer: Any
    ) -> None:
        super().__init__(**optimizer)
        if beta <= 0:
            raise UserError(f"stage.beta={beta} is not above 0", "stage.beta=0.1")
        self.source = policy
        self.beta = beta
        self.precompute_reference = precompute_reference
        self.policy: Policy | None = None
        self.reference: Frozen | None = None

    def configure_model(self) -> None:
        if self.policy is None:
            # both are opened from the same place, so that a resumed run keeps the first reference
            self.policy, reference = (
                Policy(switch_off_dropout(self.source.language_model(self.tokenizer))) for _ in range(2)
            )
            self.reference = Frozen(reference)

    def on_fit_start(self) -> None:
        if self.precompute_reference:
            self.trainer.datamodule.store_reference(self._reference_logprobs)

    @torch.no_grad()
    def _reference_logprobs(self, batch: PairBatch) -> Tensor:
        batch = self.transfer_batch_to_device(batch, self.device, 0)
        with self.trainer.precision_plugin.forward_context():
            return self._answer_logprobs(self.reference, batch)[0]

    def _answer_logprobs(self, model: Any, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Summed log-probs of the answers, [2 x pairs], and their mean entropy a token, []."""
        texts = batch.texts
        scores = model(texts.tokens, texts.mask, texts.answer)
        return scores.logprobs.sum(dim=1), masked_mean(scores.entropy, texts.answer)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        loss, numbers = self.compare(batch)
        self.log_train({"train/loss": loss, **numbers})
        return loss * batch.share

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        loss, numbers = self.compare(batch)
        self.log_val({"entropy": numbers.pop("entropy")}, batch.texts.loss_terms)  # a mean over tokens, not pairs
        self.log_val({"loss": loss, **numbers}, batch.loss_terms)

    def compare(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of pairs, and the numbers to log."""
        logprobs, entropy = self._answer_logprobs(self.policy, batch)
        chosen, rejected = batch.halves(logprobs)
        known = batch.reference if batch.reference is not None else self._reference_logprobs(batch)
        reference_chosen, reference_rejected = batch.halves(known)
        loss = sigmoid_loss(chosen, rejected, reference_chosen, reference_rejected, beta=self.beta)
        rewards = self.beta * (chosen - reference_chosen).detach(), self.beta * (rejected - reference_rejected).detach()
        return loss, {
            "rewards/chosen": rewards[0].mean(),
            "rewards/rejected": rewards[1].mean(),
            "rewards/accuracies": (rewards[0] > rewards[1]).float().mean(),
            "rewards/margins": (rewards[0] - rewards[1]).mean(),
            "logps/chosen": chosen.mean(),
            "logps/rejected": rejected.mean(),
            "entropy": entropy,
        }

    def result(self) -> Result:
        return Result(self.policy.lm, self.tokenizer)
