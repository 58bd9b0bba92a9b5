"""The same stage for answers that are labelled one by one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.data import UnpairedBatch
from rlhf.dpo.base import Numbers, PreferenceModule, lengths
from rlhf.dpo.objective import kto_loss, response_nll
from rlhf.tensors import masked_mean


class KTOModule(PreferenceModule):
    """Moves the policy towards desirable answers and away from undesirable ones. See PreferenceModule for the keys.

    The baseline, the policy's distance from the reference, is estimated on prompts that are joined with the answer of
    the next row of their batch. That costs a forward pass of policy and of reference a step, without gradient, so the
    reference stays in memory even where its log-probs of the data's answers are known.

    The baseline is a statistic of the batch, averaged over ranks: accumulated, 4 batches of 8 have four baselines where
    1 of 32 has one. Everything else of the loss is the same either way.
    """

    def __init__(self, *, loss: Callable[..., Tensor] = kto_loss, **keys: Any) -> None:
        super().__init__(loss=loss, **keys)

    def compare(self, batch: UnpairedBatch) -> tuple[Tensor, Tensor, Numbers]:
        logprobs, entropy = self.response_logprobs(batch.sequences)
        reference = batch.ref_logprobs if batch.ref_logprobs is not None else self.compute_ref_logprobs(batch.sequences)
        said = self.loss_inputs(logprobs, reference, batch.sequences)
        kl, desirable = self.baseline(batch), batch.desirable
        loss = self.loss(said, desirable, kl, beta=self.beta)

        nll = response_nll(logprobs[desirable], lengths(batch.sequences)[desirable])
        return loss, nll, self._numbers(batch, self.beta * said.detach(), logprobs, kl, entropy)

    @torch.no_grad()
    def baseline(self, batch: UnpairedBatch) -> Tensor:
        """How far the policy is from the reference, [], nats (a token with length_normalized), 0 or more.

        Source: Ethayarajh et al. 2024, section 4.1 (arXiv:2402.01306).
        """
        texts = batch.mismatched
        logprobs, _ = self.response_logprobs(texts)
        said = self.loss_inputs(logprobs, self.compute_ref_logprobs(texts), texts)
        return self.trainer.strategy.reduce(said.mean(), reduce_op="mean").clamp(min=0)

    def _numbers(self, batch: UnpairedBatch, rewards: Tensor, logprobs: Tensor, kl: Tensor, entropy: Tensor) -> Numbers:
        """An answer counts as told apart if its reward is above the baseline just where it is desirable."""
        desirable = batch.desirable
        right = (rewards > self.beta * kl) == desirable
        groups: Numbers = [
            (batch.sequences.loss_terms, {"entropy": entropy}),
            (batch.loss_terms, {"rewards/accuracies": right.float().mean(), "kto/kl": kl}),
        ]
        for name, mask in (("chosen", desirable), ("rejected", ~desirable)):
            means = {
                f"rewards/{name}": masked_mean(rewards, mask),
                f"logps/{name}": masked_mean(logprobs.detach(), mask),
            }
            groups.append((int(mask.sum()), means))
        (_, chosen), (_, rejected) = groups[2:]
        margin = chosen["rewards/chosen"] - rejected["rewards/rejected"]
        both = batch.loss_terms if desirable.any() and not desirable.all() else 0
        return [*groups, (both, {"rewards/margins": margin})]
