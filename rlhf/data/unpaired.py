"""Data of the stages that train on unpaired preferences: single responses with a label."""

import logging
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf.data.batches import SequenceBatch
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.encode import Encoder
from rlhf.data.encoded import EncodedResponse, replace_response
from rlhf.data.labeled_batches import UnpairedBatch
from rlhf.data.lazy import LazySequence
from rlhf.data.records import Preference, UnpairedPreference
from rlhf.data.row_columns import NOT_STORED
from rlhf.data.rows import Rows
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
    mismatched: EncodedResponse | None = field(default=None, metadata=NOT_STORED)
    ref_logprobs: tuple[float, float] | None = field(default=None, metadata=NOT_STORED)

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
        return getattr(super().records("train"), "has_margins", False)

    def records(self, split: str) -> Sequence[UnpairedPreference]:
        records = super().records(split)
        is_paired = len(records) > 0 and isinstance(records[0], Preference)
        return UnpairedRecords(records) if is_paired else records

    def texts_of_record(self, record: Any) -> Sequence[str]:
        return [*(message["content"] for message in record.prompt.messages), record.response]

    def encode(self, encoder: Encoder, record: Any) -> EncodedUnpaired:
        text = encoder.encode_response(record.prompt.messages, record.response)
        return EncodedUnpaired(text, record.desirable, record.prompt.raw_text)

    def encoded(self, split: str) -> Rows:
        is_new = split not in self._rows
        rows = super().encoded(split)
        if is_new and rows:
            self._add_mismatched(rows, split)
            labels = set(rows.column("desirable"))
            if split == "train" and len(labels) == 1:
                log.warning(
                    "%s: every label is %s, but KTO needs desirable and undesirable responses.",
                    self.paths[split],
                    str(labels.pop()).lower(),
                )
        return rows

    def _add_mismatched(self, rows: Rows, split: str) -> None:
        sources = [rows]
        others = rows_of_other_prompts(*_lengths_and_prompts(sources))
        if None in others and split != "train" and self.paths["train"] is not None:
            # Few validation rows may have only one prompt. They then use training rows as well.
            sources.append(self.encoded("train"))
            others = rows_of_other_prompts(*_lengths_and_prompts(sources))
        if None in others:
            raise DataError(
                f"{self.paths[split] or split}: all rows have the same prompt, but KTO combines each prompt with a "
                "response to another one.",
                f"Set data.{split}=<file>",
            )
        bos = self.tokenizer.bos_token_id if self.tokenizer is not None else None
        chosen = array("Q", [other for other in others[: len(rows)] if other is not None])
        others_content = (buffer for source in sources[1:] for buffer in source.content())

        def text(index: int) -> Any:
            return rows.value(index, "text") if index < len(rows) else sources[1].value(index - len(rows), "text")

        rows.extend(
            "mismatched",
            lambda index: replace_response(text(index), text(chosen[index]), self.max_length, bos),
            [chosen, f"{self.max_length} {bos}".encode(), *others_content],
        )

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


def rows_of_other_prompts(lengths: Sequence[int], prompts: Sequence[Hashable]) -> list[int | None]:
    """Return for each row the next longer row that has another prompt; the shortest rows follow the longest one.

    The result contains only None if all rows have the same prompt.

    Args:
        lengths: Length of each row in tokens.
        prompts: What identifies its prompt.
    """
    count = len(lengths)
    order = sorted(range(count), key=lambda i: lengths[i])
    others: list[int | None] = [None] * count
    other = None
    for k in reversed(range(2 * count)):  # In the first round, a row does not know the rows after the longest one.
        row, following = (order[i % count] for i in (k, k + 1))
        if prompts[following] != prompts[row]:
            other = following
        others[row] = other
    return others


def _lengths_and_prompts(sources: Sequence[Rows]) -> tuple[list[int], list[int]]:
    lengths = [length for rows in sources for length in rows.lengths.tolist()]
    return lengths, [hash(prompt) for rows in sources for prompt in rows.column("prompt")]


class UnpairedRecords(LazySequence[UnpairedPreference]):
    """Preference pairs as one desirable and one undesirable response each.

    Args:
        pairs: The pairs.
    """

    def __init__(self, pairs: Sequence[Preference]) -> None:
        self._pairs = pairs

    @property
    def key(self) -> Any:
        return getattr(self._pairs, "key", None)

    def __len__(self) -> int:
        return 2 * len(self._pairs)

    def item(self, index: int) -> UnpairedPreference:
        pair = self._pairs[index // 2]
        if index % 2:
            return UnpairedPreference(pair.prompt, pair.rejected, False)
        return UnpairedPreference(pair.prompt, pair.chosen, True)
