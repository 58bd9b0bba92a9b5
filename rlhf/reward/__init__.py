"""The reward model: learns from pairs or from ratings what a good answer is."""

from rlhf.reward.datamodule import RewardDataModule
from rlhf.reward.module import RewardModule

__all__ = ["RewardDataModule", "RewardModule"]
