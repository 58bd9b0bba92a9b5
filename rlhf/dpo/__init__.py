"""Direct preference optimization and its relatives: train a policy on preferences, without a reward model."""

from rlhf.dpo.kto import KTOModule
from rlhf.dpo.module import DPOModule

__all__ = ["DPOModule", "KTOModule"]
