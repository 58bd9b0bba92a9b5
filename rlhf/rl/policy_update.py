"""The policy loss of one update."""

from collections.abc import Callable

from torch import Tensor

from rlhf.models import EntropyMode, PolicyOutput
from rlhf.rl.experience import Minibatch
from rlhf.rl.kl import KLController
from rlhf.rl.metrics import update_metrics
from rlhf.rl.objective import clipped_policy_loss
from rlhf.rl.policies import PolicyWithReference
from rlhf.rl.update_limits import UpdateLimits


class PolicyUpdate:
    """Computes the clipped policy loss with entropy bonus and KL penalty.

    Args:
        kl: The KL penalty.
        clip_range: Clip range of ratios below 1.
        clip_range_high: Clip range of ratios above 1.
        entropy_coef: Coefficient of the entropy bonus.
        limits: Limits on updates.
        loss_reduction: Reduces [batch, time] terms and their mask to a scalar.
    """

    def __init__(
        self,
        *,
        kl: KLController,
        clip_range: float,
        clip_range_high: float,
        entropy_coef: float,
        limits: UpdateLimits,
        loss_reduction: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.kl = kl
        self.clip_range = clip_range
        self.clip_range_high = clip_range_high
        self.entropy_coef = entropy_coef
        self.limits = limits
        self.loss_reduction = loss_reduction

    def policy_output(
        self, policies: PolicyWithReference, minibatch: Minibatch, states: Tensor | None = None
    ) -> PolicyOutput:
        """Evaluate the response tokens of a minibatch under the current policy.

        Args:
            policies: The policy and its reference model.
            minibatch: The minibatch.
            states: See ``PolicyWithReference``.
        """
        entropy: EntropyMode = "grad" if self.entropy_coef else "value"
        return policies.policy_output(minibatch.inputs, entropy=entropy, states=states)

    def loss(
        self, policies: PolicyWithReference, minibatch: Minibatch, output: PolicyOutput
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the policy loss of a minibatch.

            L = L_clip - entropy_coef * mean(entropy) + kl_coef * mean(KL),    the last term only with apply_to=loss

        Args:
            policies: The policy and its reference model.
            minibatch: The minibatch.
            output: Output of the current policy on it.

        Returns:
            Scalar loss, and metrics.
        """
        surrogate = clipped_policy_loss(
            output.logprobs,
            minibatch.old_logprobs,
            minibatch.advantages,
            minibatch.response_mask,
            clip_range=self.clip_range,
            clip_range_high=self.clip_range_high,
            dual_clip=self.limits.dual_clip,
            loss_reduction=self.loss_reduction,
        )
        loss = surrogate
        metrics = update_metrics(minibatch, output, low=self.clip_range, high=self.clip_range_high)
        if self.entropy_coef:
            assert output.entropy is not None
            loss = loss - self.entropy_coef * self.loss_reduction(output.entropy, minibatch.response_mask)
        if self.kl.in_loss:
            kl = self.loss_reduction(self._kl(policies, minibatch, output), minibatch.response_mask)
            loss = loss + self.kl.coef * kl
            metrics["loss/kl_avg"] = kl
        return loss, {"loss/policy_avg": surrogate, **metrics}

    @staticmethod
    def _kl(policies: PolicyWithReference, minibatch: Minibatch, output: PolicyOutput) -> Tensor:
        """Compute the KL at each token, [minibatch, time], with the gradient of the policy."""
        reference = policies.reference_output(minibatch.inputs) if policies.needs_ref_output else None
        return policies.kl(output, minibatch.ref_logprobs, minibatch.response_mask, reference)
