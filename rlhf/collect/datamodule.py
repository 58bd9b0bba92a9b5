"""Prompts to collect preferences for."""

import random
from collections.abc import Sequence
from typing import Any

from rlhf.data import PromptDataModule
from rlhf.data.reading import select
from rlhf.schema import PositiveInt


class CollectDataModule(PromptDataModule):
    """Draws prompts at random from the training data, in the order of the data.

    Args:
        num_prompts: Number of prompts, drawn with ``seed``. null, or more than there are: all of them.
        keys: The remaining keys are those of ``RecordDataModule``.
    """

    def __init__(self, *, num_prompts: PositiveInt | None = None, **keys: Any) -> None:
        super().__init__(**keys)
        self.num_prompts = num_prompts

    def records(self, split: str) -> Sequence[Any]:
        records = super().records(split)
        if split == "train" and self.num_prompts is not None and len(records) > self.num_prompts:
            chosen = sorted(random.Random(self.seed).sample(range(len(records)), self.num_prompts))
            self._records["train"] = records = select(records, chosen)
        return records

    def setup(self, stage: str) -> None:
        self._require("train")
        self.encoded("train")

    def test_dataloader(self) -> Any:
        return self.loader("train")
