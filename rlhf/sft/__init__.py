"""Supervised fine-tuning: the base model learns to answer as the demonstrations do."""

from rlhf.sft.datamodule import SFTDataModule
from rlhf.sft.module import SFTModule

__all__ = ["SFTDataModule", "SFTModule"]
