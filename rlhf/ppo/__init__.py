"""Proximal policy optimization: the policy answers, the reward model judges, the policy improves."""

from rlhf.ppo.datamodule import PromptDataModule
from rlhf.ppo.module import PPOModule
from rlhf.ppo.scores import ScoreShaping

__all__ = ["PPOModule", "PromptDataModule", "ScoreShaping"]
