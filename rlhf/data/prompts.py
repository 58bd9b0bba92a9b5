"""Data of the stages that sample responses to prompts."""

from dataclasses import dataclass
from typing import Any

from rlhf.data.batches import PromptBatch
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.encode import Encoder
from rlhf.data.records import Prompt
from rlhf.errors import ConfigError


@dataclass
class EncodedPrompt:
    """Token ids of a prompt, with its record."""

    input_ids: list[int]
    record: Prompt


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
        return PromptBatch([row.input_ids for row in rows], [row.record for row in rows])
