"""Evaluation: what the models of a run answer to held-out prompts, and how good that is."""

from rlhf.evaluate.datamodule import HeldOutDataModule
from rlhf.evaluate.module import EvaluateModule

__all__ = ["EvaluateModule", "HeldOutDataModule"]
