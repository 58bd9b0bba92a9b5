"""The policy and its reference model, evaluated in the same way during collection and during updates."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from rlhf.models import EntropyMode, Frozen, Policy, PolicyOutput, kl_divergence
from rlhf.rl.kl import ESTIMATORS, FULL


@dataclass
class PolicyWithReference:
    """A policy and its frozen reference model, both evaluated at the sampling temperature.

    The tensor arguments of all methods have shape [batch, time]. ``response_tokens`` is the number of True entries of
    ``response_mask``, see ``Policy.forward``.

    Args:
        policy: The policy that is trained.
        reference: The reference model of the KL penalty.
        temperature: Divisor of the logits of both models, as in sampling.
        kl_estimator: ``k1``, ``k2``, ``k3`` or ``full``.
    """

    policy: Policy
    reference: Frozen
    temperature: float
    kl_estimator: str

    def policy_output(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        *,
        entropy: EntropyMode = "none",
        response_tokens: int | None = None,
    ) -> PolicyOutput:
        """Evaluate the response tokens under the current policy."""
        tokens = (input_ids, attention_mask, response_mask)
        output: PolicyOutput = self.policy(*tokens, self.temperature, entropy=entropy, response_tokens=response_tokens)
        return output

    def reference_output(
        self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, *, response_tokens: int | None = None
    ) -> PolicyOutput:
        """Evaluate the response tokens under the reference model, without gradients."""
        tokens = (input_ids, attention_mask, response_mask)
        output: PolicyOutput = self.reference(*tokens, self.temperature, response_tokens=response_tokens)
        return output

    def kl(
        self, output: PolicyOutput, ref_logprobs: Tensor, response_mask: Tensor, ref_output: PolicyOutput | None = None
    ) -> Tensor:
        """Compute the KL to the reference model at each response token, with the gradient of the policy.

        Args:
            output: Output of the policy.
            ref_logprobs: [batch, time] log-probs under the reference model.
            response_mask: [batch, time] bool, True on response tokens including EOS.
            ref_output: Output of the reference model. Only ``full`` needs it.

        Returns:
            [batch, time] KL, in nats; 0 on masked tokens.
        """
        if self.needs_ref_output:
            assert ref_output is not None
            reference = cast(Policy, self.reference.model)
            return kl_divergence(
                self.policy, output.states, reference, ref_output.states, response_mask, self.temperature
            )
        # Mask before the estimator: it must not see values on padding.
        return ESTIMATORS[self.kl_estimator](
            torch.where(response_mask, output.logprobs, 0.0), torch.where(response_mask, ref_logprobs, 0.0)
        )

    @property
    def needs_ref_output(self) -> bool:
        """Whether ``kl`` needs the distribution of the reference model, not only its log-probs."""
        return self.kl_estimator == FULL
