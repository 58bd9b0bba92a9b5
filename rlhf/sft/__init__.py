"""Supervised fine-tuning (SFT) of the base model on demonstrations."""

from rlhf.sft.datamodule import SFTDataModule
from rlhf.sft.module import SFTModule

__all__ = ["SFTDataModule", "SFTModule"]
