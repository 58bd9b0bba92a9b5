"""Preference pairs as batches, for the stages that learn from them."""

from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data.batches import PairBatch, TextBatch
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.encode import EncodedAnswer, Encoder
from rlhf.data.records import Preference


@dataclass
class EncodedPair:
    """Both answers of a pair with their prompt; ``reference`` holds their log-probs under the reference, once known."""

    chosen: EncodedAnswer
    rejected: EncodedAnswer
    margin: float
    reference: tuple[float, float] | None = None

    @property
    def answers(self) -> tuple[EncodedAnswer, EncodedAnswer]:
        return self.chosen, self.rejected


class PreferenceDataModule(RecordDataModule):
    """Pairs of answers. See RecordDataModule for the keys."""

    forms = (Preference,)

    def text_of(self, record: Any) -> list[str]:
        return [*(message["content"] for message in record.prompt.messages), record.chosen, record.rejected]

    def encode(self, encoder: Encoder, record: Any) -> Any:
        chosen, rejected = encoder.answers(record.prompt.messages, [record.chosen, record.rejected])
        if chosen.tokens == rejected.tokens:  # they differed only in what was cut
            return None
        return EncodedPair(chosen, rejected, record.margin)

    def length(self, row: Any) -> int:
        return max(len(row.chosen.tokens), len(row.rejected.tokens))

    def collate(self, rows: list[Any]) -> Any:
        texts = TextBatch.collate([row.chosen for row in rows] + [row.rejected for row in rows])
        known = all(row.reference is not None for row in rows)
        reference = torch.tensor([row.reference for row in rows]).T.flatten() if known else None
        return PairBatch(texts, torch.tensor([row.margin for row in rows]), reference)
