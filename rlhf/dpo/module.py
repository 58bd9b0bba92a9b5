"""The DPO stage: pairs of answers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlhf.data import PairBatch
from rlhf.dpo.base import Numbers, PreferenceModule, lengths
from rlhf.dpo.objective import answer_nll, sigmoid_loss


class DPOModule(PreferenceModule):
    """Moves the policy towards chosen answers and away from rejected ones. See PreferenceModule for the keys."""

    def __init__(self, *, objective: Callable[..., Tensor] = sigmoid_loss, **keys: Any) -> None:
        super().__init__(objective=objective, **keys)

    def compare(self, batch: PairBatch) -> tuple[Tensor, Tensor, Numbers]:
        logprobs, entropy = self.answer_logprobs(batch.texts)
        chosen, rejected = batch.halves(self.as_objective_reads(logprobs, self._reference(batch), batch.texts))
        loss = self.objective(chosen, rejected, beta=self.beta)

        chosen_logprobs, rejected_logprobs = batch.halves(logprobs)
        nll = answer_nll(chosen_logprobs, batch.halves(lengths(batch.texts))[0])
        rewards = self.beta * chosen.detach(), self.beta * rejected.detach()
        numbers = {
            "rewards/chosen": rewards[0].mean(),
            "rewards/rejected": rewards[1].mean(),
            "rewards/accuracies": (rewards[0] > rewards[1]).float().mean(),
            "rewards/margins": (rewards[0] - rewards[1]).mean(),
            "logps/chosen": chosen_logprobs.mean(),
            "logps/rejected": rejected_logprobs.mean(),
        }
        return loss, nll, [(batch.loss_terms, numbers), (batch.texts.loss_terms, {"entropy": entropy})]

    def _reference(self, batch: PairBatch) -> Tensor | None:
        """[2 x pairs], nats: what is known already, or what the reference says now; None without a reference."""
        if self.reference is None:
            return None
        return batch.reference if batch.reference is not None else self.reference_logprobs(batch.texts)
