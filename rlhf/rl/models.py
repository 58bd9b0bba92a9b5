"""The models of on-policy training, evaluated in the same way for rollouts and for updates."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from rlhf.models import EntropyMode, Frozen, Policy, PolicyOutput, ScalarHead, ScalarModel, kl_divergence
from rlhf.models.optimizations.concurrent import can_compute_concurrently, concurrent_states
from rlhf.rl.experience import ModelInputs
from rlhf.rl.kl import ESTIMATORS, FULL
from rlhf.tensors import scatter

Critic: TypeAlias = ScalarModel | ScalarHead  # a separate model, or a head on the policy


@dataclass
class OnPolicyModels:
    """The policy, its frozen reference model and, in PPO, the critic.

    Args:
        policy: The policy that is trained.
        reference: The reference model of the KL penalty; None: no KL is computed.
        critic: The critic; None: there is none.
        temperature: Divisor of the logits of policy and reference model, as in sampling.
        kl_estimator: ``k1``, ``k2``, ``k3`` or ``full``.
        entropy: Whether updates need the gradient of the entropy, ``grad``, or only its ``value``.
    """

    policy: Policy
    reference: Frozen | None
    critic: Critic | None
    temperature: float
    kl_estimator: str
    entropy: EntropyMode

    def rollout_outputs(self, inputs: ModelInputs) -> tuple[PolicyOutput, PolicyOutput | None, Tensor | None]:
        """Evaluate the response tokens before the updates: under the policy, the reference model and the critic.

        Returns:
            Output of the policy, output of the reference model (None without one), and the critic's value before each
            response token: [batch, time], in reward units, 0 on masked tokens; None without a critic.
        """
        if self.reference is None:
            output, values = self._policy_and_critic(inputs)
            return output, None, values
        states, ref_states = self._states(inputs, "reference")
        output = self._policy_output(self.policy, inputs, states=states)
        ref_output = self._policy_output(self.reference, inputs, states=ref_states)
        return output, ref_output, self._values(inputs, output)

    def update_outputs(self, inputs: ModelInputs) -> tuple[PolicyOutput, Tensor | None]:
        """Evaluate the response tokens in an update: under the policy, with entropy, and the critic.

        Returns:
            Output of the policy, and values as in ``rollout_outputs``.
        """
        return self._policy_and_critic(inputs, entropy=self.entropy)

    def kl(
        self, inputs: ModelInputs, output: PolicyOutput, ref_logprobs: Tensor, ref_output: PolicyOutput | None = None
    ) -> Tensor:
        """Compute the KL to the reference model at each response token, with the gradient of the policy.

        Args:
            inputs: Prompts with responses.
            output: Output of the policy.
            ref_logprobs: [batch, time] log-probs under the reference model.
            ref_output: Output of the reference model, which only ``full`` needs. None: it is computed if necessary.

        Returns:
            [batch, time] KL, in nats; 0 on masked tokens.
        """
        response_mask = inputs.response_mask
        if self.kl_estimator == FULL:
            assert self.reference is not None
            ref_output = ref_output or self._policy_output(self.reference, inputs)
            reference = cast(Policy, self.reference.model)
            models = (self.policy, output.states, reference, ref_output.states)
            return kl_divergence(*models, response_mask, self.temperature)
        # Mask before the estimator: it must not see values on padding.
        return ESTIMATORS[self.kl_estimator](
            torch.where(response_mask, output.logprobs, 0.0), torch.where(response_mask, ref_logprobs, 0.0)
        )

    def _policy_and_critic(self, inputs: ModelInputs, **keys: Any) -> tuple[PolicyOutput, Tensor | None]:
        states, critic_states = self._states(inputs, "critic")
        output = self._policy_output(self.policy, inputs, states=states, **keys)
        return output, self._values(inputs, output, critic_states)

    def _policy_output(self, model: nn.Module, inputs: ModelInputs, **keys: Any) -> PolicyOutput:
        *tensors, response_tokens = inputs
        output: PolicyOutput = model(*tensors, self.temperature, response_tokens=response_tokens, **keys)
        return output

    def _values(self, inputs: ModelInputs, output: PolicyOutput, states: Tensor | None = None) -> Tensor | None:
        """Compute the values of the critic: of a head from the states of the policy, of a model from its own states."""
        if self.critic is None:
            return None
        if isinstance(self.critic, ScalarHead):
            values = self.critic(output.states)
        elif states is None:
            return self.critic.token_values(*inputs)
        else:
            values = self.critic.values(states)
        return scatter(values, inputs.response_mask)

    def _states(
        self, inputs: ModelInputs, other: Literal["reference", "critic"]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the states of the policy and of another model at the same time; None if that is not possible.

        Rounding may depend on the number of threads, and the first ratio is exactly 1 and the first KL exactly 0 only
        with equal rounding. Therefore, either all models are computed in this way or none.
        """
        if not isinstance(self.critic, ScalarModel):
            return None, None
        policy = self.policy.lm.base_model
        others = {"critic": self.critic.trunk}
        if self.reference is not None:
            others["reference"] = cast(Policy, self.reference.model).lm.base_model
        if not can_compute_concurrently(policy, *others.values()):
            return None, None
        return concurrent_states((policy, others[other]), *inputs)
