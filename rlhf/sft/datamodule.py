"""Data of supervised fine-tuning."""

from typing import Any, Literal

from rlhf.data import Demonstration, EncodedResponse, Encoder, RecordDataModule, SequenceBatch
from rlhf.schema import check_arguments


class SFTDataModule(RecordDataModule):
    """Reads demonstrations: prompts with the responses to learn. The other arguments are those of ``RecordDataModule``.

    Args:
        loss_on: Tokens that the loss covers: ``response``, or ``all`` for prompt and response.
    """

    record_types = (Demonstration,)

    def __init__(self, *, loss_on: Literal["response", "all"] = "response", **keys: Any) -> None:
        super().__init__(**keys)
        check_arguments(SFTDataModule, "data", locals())
        self.loss_on = loss_on

    def encode(self, encoder: Encoder, record: Demonstration) -> EncodedResponse:
        encoded = encoder.encode_response(record.prompt.messages, record.response)
        # With loss_on=all, the loss starts at the second token: nothing precedes the first one.
        return encoded if self.loss_on == "response" else EncodedResponse(encoded.input_ids, 1)

    def length(self, row: EncodedResponse) -> int:
        return len(row.input_ids)

    def collate(self, rows: list[EncodedResponse]) -> SequenceBatch:
        return SequenceBatch.collate(rows)
