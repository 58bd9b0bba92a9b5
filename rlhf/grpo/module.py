"""The GRPO stage."""

from typing import Any

from rlhf.errors import ConfigError
from rlhf.rl import AdvantageEstimator, KLController, OnPolicyModule, ScoreShaping
from rlhf.rl.advantage_calls import estimator_name, needs_critic
from rlhf.rl.advantages import grpo
from rlhf.rl.objective import LossReduction
from rlhf.schema import NonNegativeFloat, PositiveInt


class GRPOModule(OnPolicyModule):
    """Group relative policy optimization and other methods without a critic (Shao et al. 2024, arXiv:2402.03300).

    Each choice of ``advantage=`` sets the KL penalty, the shaping of scores and the loss reduction to those of its
    paper. The defaults are those of ``advantage=grpo``.

    Args:
        advantage: The advantage estimator, selected by ``advantage=``. See ``rlhf.rl.advantages``.
        num_generations: Number of responses per prompt, the size of a group.
        scores: Normalization and clipping of scores. None: raw scores, which the estimator normalizes in each group.
        kl: Where and how the KL penalty is applied. None: k3 in the loss.
        kl_coef: KL coefficient, in loss units per nat per token, or in reward units per nat with
            ``stage.kl.apply_to=reward``.
        loss_reduction: ``sequence_mean``, ``sequence_sum`` or ``token_mean``; see ``OnPolicyModule``.
        keys: The remaining keys are those of ``OnPolicyModule``.

    Raises:
        ConfigError: The advantage estimator requires a critic, or as ``OnPolicyModule``.
    """

    def __init__(
        self,
        *,
        advantage: AdvantageEstimator = grpo,
        num_generations: PositiveInt = 4,
        scores: ScoreShaping | None = None,
        kl: KLController | None = None,
        kl_coef: NonNegativeFloat = 0.2,
        loss_reduction: LossReduction = "sequence_mean",
        **keys: Any,
    ) -> None:
        if needs_critic(advantage):
            raise ConfigError(
                f"The advantage estimator {estimator_name(advantage)} requires a critic, which stage=grpo does not "
                "train.",
                "Set stage=ppo or advantage=grpo.",
            )
        super().__init__(
            advantage=advantage,
            num_generations=num_generations,
            scores=scores or ScoreShaping(subtract_mean=False, scale_by_std=False, clip=None, missing_eos_penalty=0.0),
            kl=kl or KLController(apply_to="loss", estimator="k3"),
            kl_coef=kl_coef,
            loss_reduction=loss_reduction,
            **keys,
        )
