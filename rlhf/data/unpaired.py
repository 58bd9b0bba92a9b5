"""Data of the stages that train on unpaired preferences: single responses with a label."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data.batches import SequenceBatch
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.encode import EncodedResponse, Encoder, replace_response
from rlhf.data.labeled_batches import UnpairedBatch
from rlhf.data.records import Preference, UnpairedPreference
from rlhf.errors import DataError
from rlhf.schema import PositiveInt

log = logging.getLogger(__name__)


@dataclass
class EncodedUnpaired:
    """Token ids of a prompt with one labeled response.

    Args:
        text: Prompt and response.
        desirable: The label.
        prompt: Text of the prompt, which tells whether two rows have the same one.
        mismatched: The prompt with a response to another prompt.
        ref_logprobs: Summed log-probs of the two responses under the reference model, in nats. They are None until
            ``PreferenceModule.on_fit_start`` fills them in; ``collate`` then copies them into every batch.
    """

    text: EncodedResponse
    desirable: bool
    prompt: str
    mismatched: EncodedResponse | None = None
    ref_logprobs: tuple[float, float] | None = None

    @property
    def responses(self) -> tuple[EncodedResponse, EncodedResponse]:
        assert self.mismatched is not None, "UnpairedDataModule.encoded sets it"
        return self.text, self.mismatched


class UnpairedDataModule(RecordDataModule):
    """Reads responses that are labeled desirable or undesirable. A preference pair counts as one of each.

    Every row also has a mismatched sequence: its prompt with a response to another prompt, from which KTO estimates its
    KL baseline. It is chosen once, among responses of similar length, so it depends neither on the batch nor on the
    number of devices. Rows that do not fill the last batch of an epoch are left out of that epoch.

    Args:
        batch_size: Responses per training batch and device.
        keys: Keywords of ``RecordDataModule``. ``max_rows`` counts records, so a pair counts once.
    """

    record_types = (UnpairedPreference, Preference)
    drop_last = True

    def __init__(self, *, batch_size: PositiveInt = 32, **keys: Any) -> None:
        super().__init__(batch_size=batch_size, **keys)

    @property
    def has_margins(self) -> bool:
        """Whether training records are preference pairs with a margin, which is not used here."""
        return any(isinstance(record, Preference) and record.margin for record in super().records("train"))

    def records(self, split: str) -> list[UnpairedPreference]:
        return [row for record in super().records(split) for row in _as_unpaired(record)]

    def texts_of_record(self, record: Any) -> Sequence[str]:
        return [*(message["content"] for message in record.prompt.messages), record.response]

    def encode(self, encoder: Encoder, record: Any) -> EncodedUnpaired:
        text = encoder.encode_response(record.prompt.messages, record.response)
        return EncodedUnpaired(text, record.desirable, record.prompt.raw_text)

    def encoded(self, split: str) -> list[Any]:
        is_new = split not in self._rows
        rows = super().encoded(split)
        if is_new and rows:
            self._add_mismatched(rows, split)
            labels = {row.desirable for row in rows}
            if split == "train" and len(labels) == 1:
                log.warning(
                    "%s: every label is %s, but KTO needs desirable and undesirable responses.",
                    self.paths[split],
                    str(labels.pop()).lower(),
                )
        return rows

    def _add_mismatched(self, rows: list[EncodedUnpaired], split: str) -> None:
        # Few validation rows may have only one prompt. They then use training rows as well.
        others = rows_of_other_prompts(rows)
        if None in others and split != "train" and self.paths["train"] is not None:
            others = rows_of_other_prompts([*rows, *self.encoded("train")])
        bos = self.tokenizer.bos_token_id if self.tokenizer is not None else None
        for row, other in zip(rows, others, strict=False):
            if other is None:
                raise DataError(
                    f"{self.paths[split] or split}: all rows have the same prompt, but KTO combines each prompt with a "
                    "response to another one.",
                    f"Set data.{split}=<file>",
                )
            row.mismatched = replace_response(row.text, other.text, self.max_length, bos)

    def length(self, row: Any) -> int:
        return len(row.text.input_ids)

    def collate(self, rows: list[Any]) -> UnpairedBatch:
        known = all(row.ref_logprobs is not None for row in rows)
        ref_logprobs = torch.tensor([row.ref_logprobs for row in rows]) if known else None
        return UnpairedBatch(
            SequenceBatch.collate([row.text for row in rows]),
            desirable=torch.tensor([row.desirable for row in rows]),
            mismatched=SequenceBatch.collate([row.mismatched for row in rows]),
            ref_logprobs=ref_logprobs[:, 0] if ref_logprobs is not None else None,
            mismatched_ref_logprobs=ref_logprobs[:, 1] if ref_logprobs is not None else None,
        )


def rows_of_other_prompts(rows: Sequence[EncodedUnpaired]) -> list[EncodedUnpaired | None]:
    """Return for each row the next longer row that has another prompt; the shortest rows follow the longest one.

    The result contains only None if all rows have the same prompt.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].text.input_ids))
    others: list[EncodedUnpaired | None] = [None] * len(rows)
    other = None
    for k in reversed(range(2 * len(rows))):  # In the first round, a row does not know the rows after the longest one.
        row, following = (rows[order[i % len(rows)]] for i in (k, k + 1))
        if following.prompt != row.prompt:
            other = following
        others[order[k % len(rows)]] = other
    return others


def _as_unpaired(record: UnpairedPreference | Preference) -> Sequence[UnpairedPreference]:
    if isinstance(record, UnpairedPreference):
        return [record]
    return [
        UnpairedPreference(record.prompt, record.chosen, True),
        UnpairedPreference(record.prompt, record.rejected, False),
    ]
