"""Learning without a critic: several answers to a prompt are each other's baseline (GRPO, RLOO, REINFORCE++)."""

from rlhf.grpo.module import GRPOModule

__all__ = ["GRPOModule"]
