"""Prompts as batches, for the stages that answer them."""

from typing import Any

from rlhf.data.batches import PromptBatch
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.encode import Encoder
from rlhf.data.records import Prompt
from rlhf.errors import UserError


class PromptDataModule(RecordDataModule):
    """Prompts of records of any form. See RecordDataModule for the keys; max_length includes room for the answer."""

    forms = (Prompt,)

    def texts_of_record(self, record: Any) -> list[str]:
        return [*(message["content"] for message in record.messages), " " + (record.target or "")]

    def encode(self, encoder: Encoder, record: Any) -> Any:
        room = self.trainer.lightning_module.sampling.max_new_tokens
        if room >= self.max_length:
            raise UserError(
                f"data.max_length={self.max_length} leaves no room for a prompt beside "
                f"stage.sampling.max_new_tokens={room}",
                f"data.max_length={2 * room}",
            )
        return encoder.encode_prompt(record.messages, room=room), record

    def length(self, row: Any) -> int:
        return len(row[0])

    def collate(self, rows: list[Any]) -> PromptBatch:
        return PromptBatch([input_ids for input_ids, _ in rows], [record for _, record in rows])
