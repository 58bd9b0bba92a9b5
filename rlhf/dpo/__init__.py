"""Direct preference optimization: the policy learns from preferences, without a reward model."""

from rlhf.dpo.datamodule import DPODataModule, UnpairedDataModule
from rlhf.dpo.kto import KTOModule
from rlhf.dpo.module import DPOModule

__all__ = ["DPODataModule", "DPOModule", "KTOModule", "UnpairedDataModule"]
