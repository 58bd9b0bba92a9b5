"""Held-out prompts, with the data's own answers where it has them."""

from rlhf.data import PromptRecordDataModule


class HeldOutDataModule(PromptRecordDataModule):
    """Prompts of records of any form; ``data.test`` names the file. See RecordDataModule for the keys."""
