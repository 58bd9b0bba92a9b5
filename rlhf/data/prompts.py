"""Data of the stages that sample responses to prompts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from rlhf.data.batches import PromptBatch
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.encode import Encoder
from rlhf.data.reading import Records
from rlhf.data.records import Prompt
from rlhf.data.row_columns import NOT_STORED
from rlhf.errors import ConfigError, DataError


@dataclass
class EncodedPrompt:
    """Token ids of a prompt, with its record.

    Args:
        input_ids: Token ids.
        record: The record.
        columns: See ``Prompt``. ``read_columns`` sets them.
    """

    input_ids: list[int]
    record: Prompt
    columns: Mapping[str, Any] = field(default_factory=dict, metadata=NOT_STORED)


class PromptDataModule(RecordDataModule):
    """Reads prompts from records of any kind. The arguments are those of ``RecordDataModule``.

    ``max_length`` covers prompt and response. The LightningModule determines how many of these tokens are reserved for
    the response: it must have an attribute ``response_budget``, the maximum response length in tokens.
    """

    record_types = (Prompt,)

    def texts_of_record(self, record: Any) -> list[str]:
        return [*(message["content"] for message in record.messages), " " + (record.target or "")]

    def encode(self, encoder: Encoder, record: Any) -> Any:
        budget: int = self.module.response_budget
        if budget >= self.max_length:
            raise ConfigError(
                f"data.max_length must be greater than stage.sampling.max_new_tokens ({budget}), got "
                f"{self.max_length}. Prompts share data.max_length with responses.",
                f"Set data.max_length={2 * budget}.",
            )
        return EncodedPrompt(encoder.encode_prompt(record.messages, reserve=budget), record)

    def encode_settings(self) -> dict[str, Any]:
        return {**super().encode_settings(), "response_budget": self.module.response_budget}

    def length(self, row: Any) -> int:
        return len(row.input_ids)

    def collate(self, rows: list[Any]) -> PromptBatch:
        prompts = [replace(row.record, columns=row.columns) if row.columns else row.record for row in rows]
        return PromptBatch([row.input_ids for row in rows], prompts)

    def read_columns(self, columns: Mapping[str, bool], split: str, reader: str) -> None:
        """Add the values of further columns of the data to the prompts of a split, whose rows have been encoded.

        A prompt whose row lacks a column that other rows have gets None.

        Args:
            columns: The columns, each with whether the data must have it. ``EVERY_COLUMN`` stands for all columns.
            split: ``train``, ``val`` or ``test``.
            reader: What reads the columns, for the error message.

        Raises:
            DataError: The data lack a required column.
        """
        records = self.records(split)
        if not columns or not isinstance(records, Records):
            return
        found = records.existing_columns(columns)
        if missing := [name for name, required in columns.items() if required and name not in found]:
            available = list(records.first_row())
            similar = get_close_matches(missing[0], available, n=1)
            raise DataError(
                f"{records.path}: the data have no column '{missing[0]}', which {reader} requires (columns: "
                f"{', '.join(available)}).",
                f"Did you mean '{similar[0]}'?" if similar else "Add the column, or give the parameter a default.",
            )
        if found:
            rows, names = self.encoded(split), sorted(found)
            rows.extend("columns", lambda index: records.values(int(rows.numbers[index]), names))
