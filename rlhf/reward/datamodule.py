"""Preference pairs or ratings as batches, and demonstrations to centre the scores on."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from rlhf.data import (
    BatchLoader,
    Demonstration,
    EncodedResponse,
    Encoder,
    Preference,
    PreferenceDataModule,
    Rating,
    RatingBatch,
    SequenceBatch,
)
from rlhf.data.files import read_rows
from rlhf.data.loader import BucketBatchSampler


@dataclass
class EncodedRating:
    """An answer with its prompt, and what it is worth."""

    text: EncodedResponse
    reward: float


class RewardDataModule(PreferenceDataModule):
    """Pairs, or ratings: the fields of the first row decide. See RecordDataModule for the other keys.

    Args:
        demonstrations: file of SFT records; the mean score of their answers is stored and subtracted; null for none.
        demonstration_rows: how many of them are scored.
    """

    record_types = (Preference, Rating)

    def __init__(self, *, demonstrations: str | None = None, demonstration_rows: int = 512, **keys: Any) -> None:
        super().__init__(**keys)
        self.demonstrations = demonstrations
        self.demonstration_rows = demonstration_rows

    def texts_of_record(self, record: Any) -> list[str]:
        if isinstance(record, Preference):
            return super().texts_of_record(record)
        return [*(message["content"] for message in record.prompt.messages), record.response]

    def encode(self, encoder: Encoder, record: Any) -> Any:
        if isinstance(record, Preference):
            return super().encode(encoder, record)
        return EncodedRating(encoder.encode_response(record.prompt.messages, record.response), record.reward)

    def length(self, row: Any) -> int:
        return len(row.text.input_ids) if isinstance(row, EncodedRating) else super().length(row)

    def collate(self, rows: list[Any]) -> Any:
        if not isinstance(rows[0], EncodedRating):
            return super().collate(rows)
        return RatingBatch(
            SequenceBatch.collate([row.text for row in rows]), torch.tensor([row.reward for row in rows])
        )

    @property
    def has_ratings(self) -> bool:
        """True if the training records are ratings, False if they are pairs."""
        return isinstance(self.records("train")[0], Rating)

    def report_batches(self) -> Iterator[Any]:
        """The validation rows in batches, the same on every rank, as far as ``trainer.limit_val_batches`` goes."""
        rows, limit = self.encoded("val"), self.trainer.limit_val_batches
        order = BucketBatchSampler([self.length(row) for row in rows], self.eval_batch_size, shuffle=False)
        count = limit * self.trainer.world_size if isinstance(limit, int) else int(limit * len(order))
        return islice(BatchLoader(rows, self.collate, order), count if rows else 0)

    def demonstration_batches(self) -> Iterator[SequenceBatch]:
        """The demonstrations whose mean score becomes 0, in batches; none if no file is given."""
        if self.demonstrations is None:
            return
        rows = read_rows(self.demonstrations)
        encoder = self.encoder()
        coded = []
        for number in range(min(self.demonstration_rows, len(rows))):
            record = self.parser.parse(rows[number], Demonstration)
            coded.append(encoder.encode_response(record.prompt.messages, record.response))
        order = BucketBatchSampler([len(row.input_ids) for row in coded], self.eval_batch_size, shuffle=False)
        yield from BatchLoader(coded, SequenceBatch.collate, order)  # type: ignore[misc]
