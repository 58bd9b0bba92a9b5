"""KTO: the DPO stage for unpaired preferences."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf.data import UnpairedBatch
from rlhf.declared import call_declared
from rlhf.distributed import sum_over_ranks
from rlhf.dpo.base import PreferenceModule
from rlhf.dpo.metrics import MetricGroup, unpaired_metrics
from rlhf.dpo.objective import kto_loss, response_lengths, response_nll
from rlhf.errors import ConfigError


class KTOModule(PreferenceModule):
    """Trains a policy on unpaired preferences: desirable responses become more likely, undesirable ones less likely.

    The KL baseline of the loss is estimated on mismatched sequences: each prompt with a response to another prompt.
    This takes one more forward pass of the policy per step, without gradients.

    The baseline is a statistic of one batch on all ranks. With gradient accumulation, 4 batches of 8 rows use four
    baselines, where one batch of 32 rows uses one; nothing else in the loss depends on accumulation.

    Args:
        loss: Loss of unpaired preferences. It declares by name what it reads: ``log_ratios``, ``desirable``, ``kl`` and
            ``beta``, as ``rlhf.dpo.objective.kto_loss`` does.
        keys: Keywords of ``PreferenceModule``.
    """

    def __init__(self, *, loss: Callable[..., Tensor] = kto_loss, **keys: Any) -> None:
        super().__init__(loss=loss, **keys)

    def check_splitting(self) -> None:
        super().check_splitting()
        raise ConfigError(
            "stage.on_out_of_memory=halve cannot be combined with unpaired preferences: the KL baseline of KTO is a "
            "mean over a whole batch.",
            "Set stage.on_out_of_memory=stop.",
        )

    def loss_and_metrics(self, batch: UnpairedBatch) -> tuple[Tensor, Tensor, list[MetricGroup]]:
        logprobs, entropy = self.response_logprobs(batch.sequences)
        scores = self.response_scores(logprobs, batch.ref_logprobs, batch.sequences)
        kl, desirable = self.kl_baseline(batch), batch.desirable
        loss = call_declared(self.loss, log_ratios=scores, desirable=desirable, kl=kl, beta=self.beta)
        lengths = response_lengths(batch.sequences.response_mask)
        nll = response_nll(torch.where(desirable, logprobs, 0.0), torch.where(desirable, lengths, 0))
        return loss, nll, unpaired_metrics(batch, scores.detach(), logprobs.detach(), entropy, kl, beta=self.beta)

    @torch.no_grad()
    def kl_baseline(self, batch: UnpairedBatch) -> Tensor:
        """Estimate the KL divergence of the policy from the reference model on mismatched sequences.

            kl = max(0, mean_i [log pi(y_j | x_i) - log ref(y_j | x_i)])

        The mean runs over the rows of all ranks; y_j is a response to a prompt other than x_i.

        Args:
            batch: A batch with its reference log-probs, see ``fill_ref_logprobs``.

        Returns:
            Scalar, in nats, or nats per token with ``length_normalized``.

        Reference: Ethayarajh et al. 2024, section 4.1 (arXiv:2402.01306).
        """
        sequences = batch.mismatched
        logprobs = self.policy(**sequences.inputs).logprobs.sum(dim=1)
        scores = self.response_scores(logprobs, batch.mismatched_ref_logprobs, sequences)
        if batch.is_filler:
            scores = scores[:0]
        total, count = sum_over_ranks(torch.stack([scores.sum(), torch.ones_like(scores).sum()]))
        kl: Tensor = (total / count).clamp(min=0)
        return kl

    def derived_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        derived = super().derived_metrics(metrics)
        if metrics.keys() >= {"rewards/chosen", "rewards/rejected"}:
            derived["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return derived
