"""KTO: the DPO stage for unpaired preferences."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.data import UnpairedBatch
from rlhf.declared import call_declared
from rlhf.dpo.base import PreferenceModule
from rlhf.dpo.metrics import MetricGroup, unpaired_metrics
from rlhf.dpo.objective import kto_loss, response_lengths, response_nll


class KTOModule(PreferenceModule):
    """Trains a policy on unpaired preferences: desirable responses become more likely, undesirable ones less likely.

    The KL baseline of the loss is estimated on mismatched sequences: the prompt of each row with the response of the
    next row. This takes one forward pass of the policy and one of the reference model per step, without gradients. The
    reference model therefore stays in memory even if its log-probs for the data are precomputed.

    The baseline is a statistic of one batch on all ranks. With gradient accumulation, 4 batches of 8 rows use four
    baselines, where one batch of 32 rows uses one; nothing else in the loss depends on accumulation.

    Args:
        loss: Loss of unpaired preferences. It declares by name what it reads: ``log_ratios``, ``desirable``, ``kl`` and
            ``beta``, as ``rlhf.dpo.objective.kto_loss`` does.
        keys: Keywords of ``PreferenceModule``.
    """

    def __init__(self, *, loss: Callable[..., Tensor] = kto_loss, **keys: Any) -> None:
        super().__init__(loss=loss, **keys)

    def loss_and_metrics(self, batch: UnpairedBatch) -> tuple[Tensor, Tensor, list[MetricGroup]]:
        logprobs, entropy = self.response_logprobs(batch.sequences)
        known = batch.ref_logprobs
        ref_logprobs = known if known is not None else self.compute_ref_logprobs(batch.sequences)
        scores = self.response_scores(logprobs, ref_logprobs, batch.sequences)
        kl, desirable = self.kl_baseline(batch), batch.desirable
        loss = call_declared(self.loss, log_ratios=scores, desirable=desirable, kl=kl, beta=self.beta)
        nll = response_nll(logprobs[desirable], response_lengths(batch.sequences.response_mask)[desirable])
        return loss, nll, unpaired_metrics(batch, scores.detach(), logprobs.detach(), entropy, kl, beta=self.beta)

    @torch.no_grad()
    def kl_baseline(self, batch: UnpairedBatch) -> Tensor:
        """Estimate the KL divergence of the policy from the reference model on mismatched sequences.

            kl = max(0, mean_i [log pi(y_j | x_i) - log ref(y_j | x_i)]),    j = i + 1, averaged over ranks

        Returns:
            Scalar, in nats, or nats per token with ``length_normalized``.

        Reference: Ethayarajh et al. 2024, section 4.1 (arXiv:2402.01306).
        """
        sequences = batch.mismatched
        logprobs, _ = self.response_logprobs(sequences)
        scores = self.response_scores(logprobs, self.compute_ref_logprobs(sequences), sequences)
        kl: Tensor = self.trainer.strategy.reduce(scores.mean(), reduce_op="mean")
        return kl.clamp(min=0)
