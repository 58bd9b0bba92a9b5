"""What the preference stages read: pairs of answers, or answers with a verdict each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data import (
    EncodedAnswer,
    Encoder,
    Preference,
    PreferenceDataModule,
    RecordDataModule,
    TextBatch,
    Verdict,
    VerdictBatch,
    join,
)
from rlhf.errors import UserError


class DPODataModule(PreferenceDataModule):
    """Pairs of answers. See RecordDataModule for the keys."""


@dataclass
class EncodedVerdict:
    """An answer with its prompt and its label; ``reference`` holds its log-prob under the reference, once known."""

    text: EncodedAnswer
    desirable: bool
    reference: tuple[float] | None = None

    @property
    def answers(self) -> tuple[EncodedAnswer]:
        return (self.text,)


class UnpairedDataModule(RecordDataModule):
    """Answers that are desirable or not, one a row; a row that is a pair counts as two, one of each kind.

    Each row of a batch also has a mismatched text: its prompt with the answer of the next row. Rows that do not fill
    the last batch of an epoch are left out of that epoch. See RecordDataModule for the keys; max_rows counts records.
    """

    forms = (Verdict, Preference)
    whole_batches = True

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        for name, size in (("batch_size", self.batch_size), ("eval_batch_size", self.eval_batch_size)):
            if size < 2:
                raise UserError(
                    f"data.{name}={size}: KTO joins each prompt with the answer of another row of its batch",
                    f"data.{name}=16",
                )

    def records(self, split: str) -> list[Verdict]:
        return [verdict for record in super().records(split) for verdict in _verdicts(record)]

    def text_of(self, record: Any) -> Sequence[str]:
        return [*(message["content"] for message in record.prompt.messages), record.answer]

    def encode(self, encoder: Encoder, record: Any) -> EncodedVerdict:
        return EncodedVerdict(encoder.answer(record.prompt.messages, record.answer), record.desirable)

    def length(self, row: Any) -> int:
        return len(row.text.tokens)

    def collate(self, rows: list[Any]) -> VerdictBatch:
        texts = [row.text for row in rows]
        bos = self.tokenizer.bos_token_id if self.tokenizer is not None else None
        mismatched = [
            join(one, other, self.max_length, bos) for one, other in zip(texts, [*texts[1:], texts[0]], strict=True)
        ]
        known = all(row.reference is not None for row in rows)
        return VerdictBatch(
            TextBatch.collate(texts),
            desirable=torch.tensor([row.desirable for row in rows]),
            mismatched=TextBatch.collate(mismatched),
            reference=torch.tensor([row.reference[0] for row in rows]) if known else None,
        )


def _verdicts(record: Verdict | Preference) -> Sequence[Verdict]:
    if isinstance(record, Verdict):
        return [record]
    return [Verdict(record.prompt, record.chosen, True), Verdict(record.prompt, record.rejected, False)]
