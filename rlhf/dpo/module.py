"""The DPO stage: pairs of answers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlhf.data import PairBatch
from rlhf.dpo.base import Numbers, PreferenceModule, lengths
from rlhf.dpo.objective import response_nll, sigmoid_loss


class DPOModule(PreferenceModule):
    """Moves the policy towards chosen answers and away from rejected ones. See PreferenceModule for the keys."""

    def __init__(self, *, loss: Callable[..., Tensor] = sigmoid_loss, **keys: Any) -> None:
        super().__init__(loss=loss, **keys)

    def compare(self, batch: PairBatch) -> tuple[Tensor, Tensor, Numbers]:
        logprobs, entropy = self.response_logprobs(batch.sequences)
        chosen, rejected = batch.halves(self.loss_inputs(logprobs, self._reference(batch), batch.sequences))
        loss = self.loss(chosen, rejected, beta=self.beta)

        chosen_logprobs, rejected_logprobs = batch.halves(logprobs)
        nll = response_nll(chosen_logprobs, batch.halves(lengths(batch.sequences))[0])
        rewards = self.beta * chosen.detach(), self.beta * rejected.detach()
        numbers = {
            "rewards/chosen": rewards[0].mean(),
            "rewards/rejected": rewards[1].mean(),
            "rewards/accuracies": (rewards[0] > rewards[1]).float().mean(),
            "rewards/margins": (rewards[0] - rewards[1]).mean(),
            "logps/chosen": chosen_logprobs.mean(),
            "logps/rejected": rejected_logprobs.mean(),
        }
        return loss, nll, [(batch.loss_terms, numbers), (batch.sequences.loss_terms, {"entropy": entropy})]

    def _reference(self, batch: PairBatch) -> Tensor | None:
        """[2 x pairs], nats: what is known already, or what the reference says now; None without a reference."""
        if self.reference is None:
            return None
        return batch.ref_logprobs if batch.ref_logprobs is not None else self.compute_ref_logprobs(batch.sequences)
