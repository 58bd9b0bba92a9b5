"""Data of the stages that sample responses to prompts."""

from typing import Any

from rlhf.data.batches import PromptBatch
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.encode import Encoder
from rlhf.data.records import Prompt
from rlhf.errors import ConfigError


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
        return encoder.encode_prompt(record.messages, reserve=budget), record

    def length(self, row: Any) -> int:
        return len(row[0])

    def collate(self, rows: list[Any]) -> PromptBatch:
        return PromptBatch([input_ids for input_ids, _ in rows], [record for _, record in rows])
