"""What the preference stages read: pairs of answers, or answers with a row each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data import (
    EncodedResponse,
    Encoder,
    Preference,
    RecordDataModule,
    SequenceBatch,
    UnpairedBatch,
    UnpairedPreference,
    concatenate,
)
from rlhf.errors import UserError


@dataclass
class EncodedUnpaired:
    """An answer with its prompt and its label; ``reference`` holds its log-prob under the reference, once known."""

    text: EncodedResponse
    desirable: bool
    ref_logprobs: tuple[float] | None = None

    @property
    def responses(self) -> tuple[EncodedResponse]:
        return (self.text,)


class UnpairedDataModule(RecordDataModule):
    """Answers that are desirable or not, one a row; a row that is a pair counts as two, one of each kind.

    Each row of a batch also has a mismatched text: its prompt with the answer of the next row. Rows that do not fill
    the last batch of an epoch are left out of that epoch. See RecordDataModule for the keys; max_rows counts records.
    """

    forms = (UnpairedPreference, Preference)
    whole_batches = True

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        for name, size in (("batch_size", self.batch_size), ("eval_batch_size", self.eval_batch_size)):
            if size < 2:
                raise UserError(
                    f"data.{name}={size}: KTO joins each prompt with the answer of another row of its batch",
                    f"data.{name}=16",
                )

    def records(self, split: str) -> list[UnpairedPreference]:
        return [row for record in super().records(split) for row in _as_unpaired(record)]

    def texts_of_record(self, record: Any) -> Sequence[str]:
        return [*(message["content"] for message in record.prompt.messages), record.response]

    def encode(self, encoder: Encoder, record: Any) -> EncodedUnpaired:
        return EncodedUnpaired(encoder.encode_response(record.prompt.messages, record.response), record.desirable)

    def length(self, row: Any) -> int:
        return len(row.text.input_ids)

    def collate(self, rows: list[Any]) -> UnpairedBatch:
        texts = [row.text for row in rows]
        bos = self.tokenizer.bos_token_id if self.tokenizer is not None else None
        mismatched = [
            concatenate(one, other, self.max_length, bos)
            for one, other in zip(texts, [*texts[1:], texts[0]], strict=True)
        ]
        known = all(row.ref_logprobs is not None for row in rows)
        return UnpairedBatch(
            SequenceBatch.collate(texts),
            desirable=torch.tensor([row.desirable for row in rows]),
            mismatched=SequenceBatch.collate(mismatched),
            ref_logprobs=torch.tensor([row.ref_logprobs[0] for row in rows]) if known else None,
        )


def _as_unpaired(record: UnpairedPreference | Preference) -> Sequence[UnpairedPreference]:
    if isinstance(record, UnpairedPreference):
        return [record]
    return [
        UnpairedPreference(record.prompt, record.chosen, True),
        UnpairedPreference(record.prompt, record.rejected, False),
    ]
