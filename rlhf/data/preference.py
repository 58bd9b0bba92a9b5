"""Preference pairs as batches, for the stages that learn from them."""

from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data.batches import PairBatch, SequenceBatch
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.encode import EncodedResponse, Encoder
from rlhf.data.records import Preference


@dataclass
class EncodedPair:
    """Both answers of a pair with their prompt; ``reference`` holds their log-probs under the reference, once known."""

    chosen: EncodedResponse
    rejected: EncodedResponse
    margin: float
    ref_logprobs: tuple[float, float] | None = None

    @property
    def responses(self) -> tuple[EncodedResponse, EncodedResponse]:
        return self.chosen, self.rejected


class PreferenceDataModule(RecordDataModule):
    """Pairs of answers. See RecordDataModule for the keys."""

    forms = (Preference,)

    def texts_of_record(self, record: Any) -> list[str]:
        return [*(message["content"] for message in record.prompt.messages), record.chosen, record.rejected]

    def encode(self, encoder: Encoder, record: Any) -> Any:
        chosen, rejected = encoder.encode_responses(record.prompt.messages, [record.chosen, record.rejected])
        if chosen.input_ids == rejected.input_ids:  # they differed only in what was cut
            return None
        return EncodedPair(chosen, rejected, record.margin)

    def length(self, row: Any) -> int:
        return max(len(row.chosen.input_ids), len(row.rejected.input_ids))

    def collate(self, rows: list[Any]) -> Any:
        texts = SequenceBatch.collate([row.chosen for row in rows] + [row.rejected for row in rows])
        known = all(row.ref_logprobs is not None for row in rows)
        ref_logprobs = torch.tensor([row.ref_logprobs for row in rows]).T.flatten() if known else None
        return PairBatch(texts, torch.tensor([row.margin for row in rows]), ref_logprobs)
