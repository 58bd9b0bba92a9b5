"""The DPO stage, for preference pairs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlhf.data import PairBatch
from rlhf.declared import call_declared
from rlhf.dpo.base import PreferenceModule
from rlhf.dpo.metrics import MetricGroup, pair_metrics
from rlhf.dpo.objective import response_lengths, response_nll, sigmoid_loss


class DPOModule(PreferenceModule):
    """Trains a policy on preference pairs: chosen responses become more likely, rejected ones less likely.

    Args:
        loss: Loss of pairs, see ``rlhf.dpo.objective``. On the command line, choose one with ``loss=<name>``.
        keys: Keywords of ``PreferenceModule``.
    """

    def __init__(self, *, loss: Callable[..., Tensor] = sigmoid_loss, **keys: Any) -> None:
        super().__init__(loss=loss, **keys)

    def loss_and_metrics(self, batch: PairBatch) -> tuple[Tensor, Tensor, list[MetricGroup]]:
        logprobs, entropy = self.response_logprobs(batch.sequences)
        scores = self.response_scores(logprobs, batch.ref_logprobs, batch.sequences)
        chosen, rejected = batch.halves(scores)
        chosen_lengths, rejected_lengths = batch.halves(response_lengths(batch.sequences.response_mask))
        loss = call_declared(
            self.loss,
            chosen=chosen,
            rejected=rejected,
            beta=self.beta,
            margins=batch.margin,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )
        nll = response_nll(batch.halves(logprobs)[0], chosen_lengths)
        return loss, nll, pair_metrics(batch, scores.detach(), logprobs.detach(), entropy, beta=self.beta)
