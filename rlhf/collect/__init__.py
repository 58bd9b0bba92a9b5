"""Preference pairs from the responses of the current policy."""

from rlhf.collect.datamodule import CollectDataModule
from rlhf.collect.labels import Labels, PageLabels, RewardLabels
from rlhf.collect.module import CollectModule

__all__ = ["CollectDataModule", "CollectModule", "Labels", "PageLabels", "RewardLabels"]
