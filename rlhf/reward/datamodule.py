"""Preference pairs or ratings as batches, and demonstrations to center the scores on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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
from rlhf.data.loader import BucketBatchSampler
from rlhf.data.parser import RecordParser
from rlhf.errors import ConfigError, DataError
from rlhf.schema import DataPath, PositiveInt, has_default


@dataclass
class EncodedRating:
    """A prompt with a response, and the reward of the response in the data."""

    sequence: EncodedResponse
    reward: float


class RewardDataModule(PreferenceDataModule):
    """Reads preference pairs or ratings, depending on the fields of the first row.

    The other arguments are those of ``RecordDataModule``.

    Args:
        demonstrations: File of demonstrations. After training, the mean score of their responses is stored in the
            reward model and subtracted from every score (Huang et al. 2024, detail 12, arXiv:2403.17031). null: none.
            If ``columns`` does not fit the file, it is read with the default column names. ``splits`` and ``subset``
            do not apply to it.
        demonstration_rows: Number of demonstrations to score.
    """

    record_types = (Preference, Rating)

    def __init__(
        self, *, demonstrations: DataPath | None = None, demonstration_rows: PositiveInt = 512, **keys: Any
    ) -> None:
        super().__init__(**keys)
        if demonstrations is None and not has_default(RewardDataModule, "demonstration_rows", demonstration_rows):
            raise ConfigError(
                f"data.demonstration_rows={demonstration_rows} has no effect without data.demonstrations.",
                "Set data.demonstrations=<path> or remove data.demonstration_rows.",
            )
        self.demonstrations = demonstrations
        self.demonstration_rows = demonstration_rows
        self._demonstrations: Sequence[Demonstration] | None = None

    def texts_of_record(self, record: Any) -> list[str]:
        if isinstance(record, Preference):
            return super().texts_of_record(record)
        return [*(message["content"] for message in record.prompt.messages), record.response]

    def encode(self, encoder: Encoder, record: Any) -> Any:
        if isinstance(record, Preference):
            return super().encode(encoder, record)
        return EncodedRating(encoder.encode_response(record.prompt.messages, record.response), record.reward)

    def length(self, row: Any) -> int:
        return len(row.sequence.input_ids) if isinstance(row, EncodedRating) else super().length(row)

    def collate(self, rows: list[Any]) -> Any:
        if not isinstance(rows[0], EncodedRating):
            return super().collate(rows)
        sequences = SequenceBatch.collate([row.sequence for row in rows])
        return RatingBatch(sequences, torch.tensor([row.reward for row in rows]))

    @property
    def has_ratings(self) -> bool:
        """True if the training records are ratings, False if they are pairs."""
        return isinstance(self.records("train")[0], Rating)

    def report_batches(self) -> Iterator[Any]:
        """Yield this rank's share of the validation rows in batches, up to ``trainer.limit_val_batches``."""
        rows = self.encoded("val")
        batches = self._share(rows, rows.lengths, self.collate)
        trainer: Any = self.trainer
        limit = trainer.limit_val_batches
        return islice(batches, (limit if isinstance(limit, int) else int(limit * len(batches))) if rows else 0)

    def _share(self, rows: Sequence[Any], lengths: Any, collate: Callable[[list[Any]], Any]) -> BatchLoader:
        """Return a loader of this rank's share of rows, in order of length."""
        trainer: Any = self.trainer
        rank, world = trainer.global_rank, trainer.world_size
        sampler = BucketBatchSampler(lengths, self.eval_batch_size, shuffle=False, rank=rank, world=world)
        return BatchLoader(rows, collate, sampler)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.demonstration_records()  # They are needed after training, and invalid ones are reported before it.

    def demonstration_records(self) -> Sequence[Demonstration]:
        """Return the demonstrations to center the scores on; an empty list if there is no file of them."""
        if self._demonstrations is None and self.demonstrations is not None:
            self._demonstrations = self._read_demonstrations(self.demonstrations)
        return self._demonstrations or []

    def _read_demonstrations(self, path: str) -> Sequence[Demonstration]:
        # data.columns, data.splits and data.subset describe the preference data. Only column names are often the same.
        reader = replace(self.reader, max_rows=self.demonstration_rows, splits={}, subset=None)
        try:
            return reader.read(path, "train", (Demonstration,))
        except DataError:
            with suppress(DataError):
                return replace(reader, parser=RecordParser()).read(path, "train", (Demonstration,))
            raise

    def demonstration_batches(self) -> Iterator[SequenceBatch]:
        """Yield this rank's share of the demonstrations in batches, or nothing if there is no file of them."""
        if self.demonstrations is None:
            return
        encoder = self.encoder()
        encoded = [
            encoder.encode_response(record.prompt.messages, record.response) for record in self.demonstration_records()
        ]
        yield from self._share(encoded, [len(row.input_ids) for row in encoded], SequenceBatch.collate)  # type: ignore[misc]
