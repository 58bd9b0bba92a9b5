"""How the policy is held near the reference."""

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.rl.objective import kl_k1, kl_k2, kl_k3

ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
HORIZON = 10000  # answers; as in the published code
FULL = "full"  # the sum over the vocabulary in apply_to of an estimate


class KLController(nn.Module):
    """The price of leaving the reference: where it is charged, how distance is measured, and whether the price adapts.

    Args:
        apply_to: ``reward``, charged to each token's reward (Ziegler et al. 2019), or ``loss``, a term of the loss with
            its own gradient (Shao et al. 2024, GRPO).
        estimator: ``k1``, ``k2``, ``k3`` of the sampled token (J. Schulman, "Approximating KL divergence"), or
            ``full``, the exact sum over the vocabulary; that one costs another pass of the reference when in the loss.
        target_per_sequence: KL of a whole answer that the price steers to, nats; null keeps ``stage.kl_coef`` fixed.
        horizon: answers over which the price follows: it changes by at most 0.2 x answers / horizon an iteration;
            null: 10000. Only with a target.

    With a target, after each iteration over n answers (Ziegler et al. 2019, section 2.2, arXiv:1909.08593; the form
    with a horizon is that of its published code):

        error = clip(KL / target - 1, -0.2, 0.2),    coef <- coef (1 + error n / horizon)

    Raises:
        UserError: k1 in the loss. Its gradient has mean 0 whatever the KL is (grad log pi averages to 0 under pi).
    """

    coef: Tensor

    def __init__(
        self,
        *,
        apply_to: str = "reward",
        estimator: str = "k1",
        target_per_sequence: float | None = None,
        horizon: int | None = None,
    ) -> None:
        super().__init__()
        if apply_to not in ("reward", "loss"):
            raise UserError(f"stage.kl.apply_to={apply_to} is neither reward nor loss", "stage.kl.apply_to=reward")
        if estimator not in (*ESTIMATORS, FULL):
            raise UserError(f"stage.kl.estimator={estimator} is none of k1, k2, k3, full", "stage.kl.estimator=k1")
        if apply_to == "loss" and estimator == "k1":
            raise UserError(
                "stage.kl.apply_to=loss with stage.kl.estimator=k1 holds nothing: its gradient is 0 on average",
                "stage.kl.estimator=k3, k2 or full",
            )
        if target_per_sequence is not None and target_per_sequence <= 0:
            raise UserError(
                f"stage.kl.target_per_sequence={target_per_sequence} is no distance",
                "stage.kl.target_per_sequence=6, or null",
            )
        if horizon is not None and target_per_sequence is None:
            raise UserError(
                f"stage.kl.horizon={horizon} says how fast the price follows a target, and there is none",
                "stage.kl.target_per_sequence=6, or stage.kl.horizon=null",
            )
        if horizon is not None and horizon < 1:
            raise UserError(f"stage.kl.horizon={horizon} is below one answer", "stage.kl.horizon=10000")
        self.apply_to = apply_to
        self.estimator = estimator
        self.target_per_sequence = target_per_sequence
        self.horizon = HORIZON if horizon is None else horizon
        # kept in checkpoints: a resumed run goes on with the price it had
        self.register_buffer("coef", torch.zeros((), dtype=torch.float64))

    def start(self, coef: float) -> None:
        """Set the price before the first iteration, reward units per nat."""
        if coef < 0:
            raise UserError(f"stage.kl_coef={coef} would pay for leaving the reference", "stage.kl_coef=0.05")
        if coef == 0 and self.target_per_sequence is not None:
            raise UserError(
                "stage.kl.target_per_sequence steers stage.kl_coef by factors, and 0 stays 0", "stage.kl_coef=0.05"
            )
        self.coef.fill_(coef)

    @property
    def in_loss(self) -> bool:
        return self.apply_to == "loss"

    def steer(self, kl_per_sequence: Tensor, answers: int) -> None:
        """Move the price towards the target after an iteration; nothing without one.

        Args:
            kl_per_sequence: [] mean KL of an answer, nats.
            answers: how many answers it was measured on, over all devices.
        """
        if self.target_per_sequence is None:
            return
        error = (kl_per_sequence.double() / self.target_per_sequence - 1).clamp(-0.2, 0.2)
        self.coef.mul_((1 + error * answers / self.horizon).to(self.coef))
