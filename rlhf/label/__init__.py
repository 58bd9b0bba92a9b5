"""The preference page: people choose between two responses, and their choices become preference rows."""

from rlhf.label.command import label

__all__ = ["label"]
