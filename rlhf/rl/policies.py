"""The policy and its reference model, evaluated in the same way during collection and during updates."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.models import EntropyMode, Frozen, Policy, PolicyOutput, ScalarModel, kl_divergence
from rlhf.models.optimizations.concurrent import can_compute_concurrently, concurrent_states
from rlhf.rl.experience import ModelInputs
from rlhf.rl.kl import ESTIMATORS, FULL


@dataclass
class PolicyWithReference:
    """A policy and its frozen reference model, both evaluated at the sampling temperature.

    The ``states`` that methods accept are those of ``concurrent_states``; see ``Policy.forward``.

    Args:
        policy: The policy that is trained.
        reference: The reference model of the KL penalty.
        temperature: Divisor of the logits of both models, as in sampling.
        kl_estimator: ``k1``, ``k2``, ``k3`` or ``full``.
        critic: A model whose states are computed with those of the policy in updates. None: the policy is alone.
    """

    policy: Policy
    reference: Frozen
    temperature: float
    kl_estimator: str
    critic: ScalarModel | None = None

    def policy_output(
        self, inputs: ModelInputs, *, entropy: EntropyMode = "none", states: Tensor | None = None
    ) -> PolicyOutput:
        """Evaluate the response tokens under the current policy."""
        return self._output(self.policy, inputs, entropy=entropy, states=states)

    def reference_output(self, inputs: ModelInputs, *, states: Tensor | None = None) -> PolicyOutput:
        """Evaluate the response tokens under the reference model, without gradients."""
        return self._output(self.reference, inputs, states=states)

    def _output(self, model: nn.Module, inputs: ModelInputs, **keys: Any) -> PolicyOutput:
        *tensors, response_tokens = inputs
        output: PolicyOutput = model(*tensors, self.temperature, response_tokens=response_tokens, **keys)
        return output

    def both_outputs(self, inputs: ModelInputs) -> tuple[PolicyOutput, PolicyOutput]:
        """Evaluate the response tokens under the current policy and under the reference model."""
        states, ref_states = self._states(self._reference_policy.lm.base_model, inputs)
        return self.policy_output(inputs, states=states), self.reference_output(inputs, states=ref_states)

    def states_with_critic(self, inputs: ModelInputs) -> tuple[Tensor | None, Tensor | None]:
        """Compute the states of policy and critic at the same time; None if that is not possible.

        Returns:
            [response tokens, width] states of each model, see ``concurrent_states``.
        """
        if self.critic is None:
            return None, None
        return self._states(self.critic.trunk, inputs)

    def _states(self, trunk: nn.Module, inputs: ModelInputs) -> tuple[Tensor | None, Tensor | None]:
        """Compute the states of the policy and of another model.

        Rounding may depend on the number of threads, and the first ratio is exactly 1 and the first KL exactly 0 only
        with equal rounding. Therefore, either all three models are computed in this way or none.
        """
        policy, reference = self.policy.lm.base_model, self._reference_policy.lm.base_model
        if self.critic is None or not can_compute_concurrently(policy, reference, self.critic.trunk):
            return None, None
        return concurrent_states((policy, trunk), *inputs)

    @property
    def _reference_policy(self) -> Policy:
        return cast(Policy, self.reference.model)

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
            models = (self.policy, output.states, self._reference_policy, ref_output.states)
            return kl_divergence(*models, response_mask, self.temperature)
        # Mask before the estimator: it must not see values on padding.
        return ESTIMATORS[self.kl_estimator](
            torch.where(response_mask, output.logprobs, 0.0), torch.where(response_mask, ref_logprobs, 0.0)
        )

    @property
    def needs_ref_output(self) -> bool:
        """Whether ``kl`` needs the distribution of the reference model, not only its log-probs."""
        return self.kl_estimator == FULL
