"""Direct preference optimization: the policy learns from preferences, without a reward model."""

from rlhf.dpo.datamodule import UnpairedDataModule
from rlhf.dpo.kto import KTOModule
from rlhf.dpo.module import DPOModule

__all__ = ["DPOModule", "KTOModule", "UnpairedDataModule"]
