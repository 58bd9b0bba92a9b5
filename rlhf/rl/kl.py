"""The KL penalty that keeps the policy close to the reference model."""

import math
from typing import Any, Literal

from torch import nn

from rlhf.errors import ConfigError
from rlhf.rl.objective import kl_k1, kl_k2, kl_k3
from rlhf.schema import PositiveFloat, PositiveInt, check_arguments

ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
FULL = "full"  # the exact sum over the vocabulary instead of an estimate
DEFAULT_HORIZON = 10000  # responses, as in the published code of Ziegler et al. 2019


class KLController(nn.Module):
    """KL penalty: where it is applied, which estimator is used, and whether its coefficient adapts.

    With a target, the coefficient adapts after each iteration over n responses (Ziegler et al. 2019, section 2.2,
    arXiv:1909.08593, in the form of its published code):

        error = clip(KL / target - 1, -0.2, 0.2),    coef <- coef (1 + error n / horizon)

    The coefficient is a Python float on the host. Checkpoints store it, and a resumed run restores it if it adapts;
    without a target, the resumed run uses its own ``stage.kl_coef``.

    Args:
        apply_to: ``reward`` subtracts the penalty from the reward of each token (Ziegler et al. 2019). ``loss`` adds it
            to the loss, with its own gradient (GRPO, Shao et al. 2024, arXiv:2402.03300).
        estimator: ``k1``, ``k2`` or ``k3`` of the sampled tokens (J. Schulman, "Approximating KL divergence"), or
            ``full``, the exact sum over the vocabulary. ``full`` in the loss costs one more forward pass of the
            reference model per update.
        target_per_sequence: Target of the KL, in nats per response. null keeps ``stage.kl_coef`` fixed.
        horizon: Number of responses over which the coefficient adapts: one iteration changes it by at most a fraction
            of 0.2 * responses / horizon. Used with ``target_per_sequence`` only. null: 10000.
        monitor: Whether the KL is computed and logged with ``stage.kl_coef=0`` as well. false: the stage then opens no
            reference model, which saves its memory and one forward pass per rollout.

    Raises:
        ConfigError: A value is out of range, settings contradict each other, or k1 is used in the loss, where its
            gradient is zero in expectation.
    """

    def __init__(
        self,
        *,
        apply_to: Literal["reward", "loss"] = "reward",
        estimator: Literal["k1", "k2", "k3", "full"] = "k1",
        target_per_sequence: PositiveFloat | None = None,
        horizon: PositiveInt | None = None,
        monitor: bool = True,
    ) -> None:
        super().__init__()
        check_arguments(KLController, "stage.kl", locals())
        if apply_to == "loss" and estimator == "k1":
            raise ConfigError(
                "stage.kl.apply_to=loss cannot be used with stage.kl.estimator=k1: the gradient of k1 is zero in "
                "expectation, so the penalty would have no effect.",
                "Set stage.kl.estimator=k3.",
            )
        if horizon is not None and target_per_sequence is None:
            raise ConfigError(
                f"stage.kl.horizon={horizon} has no effect without stage.kl.target_per_sequence.",
                "Set stage.kl.target_per_sequence=6 or remove stage.kl.horizon.",
            )
        self.apply_to = apply_to
        self.estimator = estimator
        self.target_per_sequence = target_per_sequence
        self.horizon = DEFAULT_HORIZON if horizon is None else horizon
        self.monitor = monitor
        self.coef = 0.0

    def initialize(self, coef: float) -> None:
        """Set the coefficient before the first iteration.

        Args:
            coef: KL coefficient, in reward units per nat, or in loss units per nat if applied to the loss.
        """
        if coef == 0 and self.target_per_sequence is not None:
            raise ConfigError(
                "stage.kl_coef must be above 0 with stage.kl.target_per_sequence, got 0: an adaptive coefficient is "
                "updated by multiplication.",
                "Set stage.kl_coef=0.05.",
            )
        if coef != 0 and not self.monitor:
            raise ConfigError(
                f"stage.kl.monitor=false requires stage.kl_coef=0, got {coef}: the penalty needs the KL.",
                "Set stage.kl_coef=0 or stage.kl.monitor=true.",
            )
        self.coef = float(coef)

    @property
    def is_computed(self) -> bool:
        """Whether the KL is computed, for the penalty or in order to log it."""
        return self.monitor or self.coef != 0

    @property
    def in_loss(self) -> bool:
        """Whether the penalty is a term of the loss."""
        return self.apply_to == "loss"

    @property
    def reward_coef(self) -> float:
        """The coefficient of the penalty in the rewards; 0 if the penalty is in the loss."""
        return 0.0 if self.in_loss else self.coef

    def update(self, kl_per_sequence: float | None, responses: int) -> float:
        """Adapt the coefficient to the rollout of an iteration. Without a target, or if the KL is not finite, it stays.

        Args:
            kl_per_sequence: Mean KL over all devices, in nats per response; None without a reference model.
            responses: Number of responses of the iteration, over all devices.

        Returns:
            The coefficient that the iteration uses: the previous one in the rewards, the adapted one in the loss.
        """
        used = self.coef
        if self.target_per_sequence and kl_per_sequence is not None and math.isfinite(kl_per_sequence):
            error = min(max(kl_per_sequence / self.target_per_sequence - 1, -0.2), 0.2)
            # An iteration with more responses than the horizon must not make the coefficient negative.
            self.coef *= 1 + error * min(responses / self.horizon, 1.0)
        return self.coef if self.in_loss else used

    def get_extra_state(self) -> dict[str, Any]:
        """Return the coefficient, for checkpoints."""
        return {"coef": self.coef}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the coefficient of a checkpoint if it adapts."""
        if self.target_per_sequence is not None:
            self.coef = float(state["coef"])
