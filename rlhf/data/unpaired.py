"""Data of the stages that train on unpaired preferences: single responses with a label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data.batches import SequenceBatch, UnpairedBatch
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.encode import EncodedResponse, Encoder, replace_response
from rlhf.data.records import Preference, UnpairedPreference
from rlhf.errors import ConfigError


@dataclass
class EncodedUnpaired:
    """Token ids of a prompt with one labeled response.

    Args:
        text: Prompt and response.
        desirable: The label.
        ref_logprobs: Summed log-prob of the response under the reference model, in nats. It is None until
            ``PreferenceModule.on_fit_start`` fills it in; ``collate`` then copies it into every batch.
    """

    text: EncodedResponse
    desirable: bool
    ref_logprobs: tuple[float] | None = None

    @property
    def responses(self) -> tuple[EncodedResponse]:
        return (self.text,)


class UnpairedDataModule(RecordDataModule):
    """Reads responses that are labeled desirable or undesirable. A preference pair counts as one of each.

    Every row of a batch also has a mismatched sequence: its prompt with the response of the next row, from which KTO
    estimates its KL baseline. Rows that do not fill the last batch of an epoch are left out of that epoch.

    Args:
        batch_size: Responses per training batch and device, at least 2.
        keys: Keywords of ``RecordDataModule``. ``max_rows`` counts records, so a pair counts once.
    """

    record_types = (UnpairedPreference, Preference)
    drop_last = True

    def __init__(self, *, batch_size: int = 32, **keys: Any) -> None:
        super().__init__(batch_size=batch_size, **keys)
        for name, size in (("batch_size", self.batch_size), ("eval_batch_size", self.eval_batch_size)):
            if size < 2:
                raise ConfigError(
                    f"data.{name} must be at least 2 for unpaired preferences, got {size}. KTO combines each prompt "
                    "with the response of another row of the batch.",
                    f"Set data.{name}=16.",
                )

    @property
    def has_margins(self) -> bool:
        """Whether training records are preference pairs with a margin, which is not used here."""
        return any(isinstance(record, Preference) and record.margin for record in super().records("train"))

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
            replace_response(text, following, self.max_length, bos)
            for text, following in zip(texts, [*texts[1:], texts[0]], strict=True)
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
