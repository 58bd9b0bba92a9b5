"""The reward model: learns to score responses from preference pairs or from ratings."""

from rlhf.reward.datamodule import RewardDataModule
from rlhf.reward.module import RewardModule

__all__ = ["RewardDataModule", "RewardModule"]
