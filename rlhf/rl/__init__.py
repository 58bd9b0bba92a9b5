"""On-policy training: what PPO and GRPO share."""

from rlhf.rl.advantages import AdvantageEstimator
from rlhf.rl.datamodule import RolloutDataModule
from rlhf.rl.experience import Experience, Minibatch, ModelInputs
from rlhf.rl.kl import KLController
from rlhf.rl.limits import UpdateLimits
from rlhf.rl.module import OnPolicyModule
from rlhf.rl.scores import ScoreShaping

__all__ = [
    "AdvantageEstimator",
    "Experience",
    "KLController",
    "Minibatch",
    "ModelInputs",
    "OnPolicyModule",
    "RolloutDataModule",
    "ScoreShaping",
    "UpdateLimits",
]
