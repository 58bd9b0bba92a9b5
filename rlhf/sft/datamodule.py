"""Data of supervised fine-tuning."""

from dataclasses import replace
from typing import Any, Literal

from rlhf.data import Demonstration, EncodedResponse, Encoder, RecordDataModule, SequenceBatch
from rlhf.schema import check_arguments


class SFTDataModule(RecordDataModule):
    """Reads demonstrations: prompts with the responses to learn. The other arguments are those of ``RecordDataModule``.

    Args:
        loss_on: Tokens that the loss covers: ``response`` for the last assistant message of a row, ``assistant`` for
            all of its assistant messages, or ``all`` for prompt and response.
    """

    record_types = (Demonstration,)

    def __init__(self, *, loss_on: Literal["response", "assistant", "all"] = "response", **keys: Any) -> None:
        super().__init__(**keys)
        check_arguments(SFTDataModule, "data", locals())
        self.loss_on = loss_on
        parser = replace(self.reader.parser, all_learned=loss_on != "response")
        self.reader = replace(self.reader, parser=parser)

    def encode(self, encoder: Encoder, record: Demonstration) -> EncodedResponse:
        messages = record.prompt.messages
        if self.loss_on == "assistant":
            return encoder.encode_conversation(messages, record.response)
        encoded = encoder.encode_response(messages, record.response)
        if self.loss_on == "all":
            return EncodedResponse(encoded.input_ids, 1)  # Nothing precedes the first token.
        encoder.counts["unlearned_messages"] += sum(message["role"] == "assistant" for message in messages)
        return encoded

    def length(self, row: EncodedResponse) -> int:
        return len(row.input_ids)

    def collate(self, rows: list[EncodedResponse]) -> SequenceBatch:
        return SequenceBatch.collate(rows)
