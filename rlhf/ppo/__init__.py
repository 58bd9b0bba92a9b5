"""Proximal policy optimization: the policy answers, the reward model judges, the policy improves."""

from rlhf.ppo.module import PPOModule

__all__ = ["PPOModule"]
