"""On-policy training without a critic: GRPO, RLOO and REINFORCE++."""

from rlhf.grpo.module import GRPOModule

__all__ = ["GRPOModule"]
