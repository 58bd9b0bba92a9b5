"""Preference pairs from the responses of the present policy."""

from rlhf.collect.datamodule import CollectDataModule
from rlhf.collect.module import CollectModule

__all__ = ["CollectDataModule", "CollectModule"]
