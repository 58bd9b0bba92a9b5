"""Direct preference optimization: the policy learns from pairs, without a reward model."""

from rlhf.dpo.datamodule import DPODataModule
from rlhf.dpo.module import DPOModule

__all__ = ["DPODataModule", "DPOModule"]
