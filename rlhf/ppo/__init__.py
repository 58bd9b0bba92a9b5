"""Proximal policy optimization."""

from rlhf.ppo.module import PPOModule

__all__ = ["PPOModule"]
