"""Data of the stages that train on preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf.data.batches import SequenceBatch
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.encode import Encoder
from rlhf.data.encoded import EncodedResponse
from rlhf.data.labeled_batches import PairBatch
from rlhf.data.records import Preference, Record
from rlhf.data.row_columns import NOT_STORED


@dataclass
class EncodedPair:
    """Token ids of a preference pair: one prompt with two responses.

    Args:
        chosen: Prompt and chosen response.
        rejected: Prompt and rejected response.
        margin: By how much the chosen response is better, in reward units.
        ref_logprobs: Summed log-probs of the chosen and the rejected response under the reference model, in nats. They
            are None until ``stage=dpo`` fills them in before training; ``collate`` then copies them into every batch.
    """

    chosen: EncodedResponse
    rejected: EncodedResponse
    margin: float
    ref_logprobs: tuple[float, float] | None = field(default=None, metadata=NOT_STORED)

    @property
    def responses(self) -> tuple[EncodedResponse, EncodedResponse]:
        return self.chosen, self.rejected


class PreferenceDataModule(RecordDataModule):
    """Reads preference pairs. The arguments are those of ``RecordDataModule``."""

    record_types: Sequence[type[Record]] = (Preference,)

    @property
    def has_margins(self) -> bool:
        """True if a preference pair of the training data has a margin, which only some losses read."""
        return getattr(self.records("train"), "has_margins", False)

    def texts_of_record(self, record: Any) -> list[str]:
        return [*(message["content"] for message in record.prompt.messages), record.chosen, record.rejected]

    def encode(self, encoder: Encoder, record: Any) -> Any:
        chosen, rejected = encoder.encode_responses(record.prompt.messages, [record.chosen, record.rejected])
        if chosen.input_ids == rejected.input_ids:  # they differ only in tokens that were truncated
            return None
        return EncodedPair(chosen, rejected, record.margin)

    def length(self, row: Any) -> int:
        return max(len(row.chosen.input_ids), len(row.rejected.input_ids))

    def collate(self, rows: list[Any]) -> Any:
        sequences = SequenceBatch.collate([row.chosen for row in rows] + [row.rejected for row in rows])
        sequences.shared_tokens = [_shared_tokens(row) for row in rows] * 2
        known = all(row.ref_logprobs is not None for row in rows)
        ref_logprobs = torch.tensor([row.ref_logprobs for row in rows]).T.flatten() if known else None
        return PairBatch(sequences, torch.tensor([row.margin for row in rows]), ref_logprobs)


def _shared_tokens(pair: EncodedPair) -> int:
    """Return the number of tokens at the beginning of the prompt that both sequences of a pair have in common."""
    start = min(pair.chosen.start, pair.rejected.start)
    chosen, rejected = pair.chosen.input_ids[:start], pair.rejected.input_ids[:start]
    if chosen == rejected:
        return start
    return next(i for i, (one, other) in enumerate(zip(chosen, rejected, strict=True)) if one != other)
