"""Demonstrations as batches."""

from typing import Any

from rlhf.data import Demonstration, EncodedResponse, Encoder, RecordDataModule, SequenceBatch


class SFTDataModule(RecordDataModule):
    """Prompts with the answers to learn. See RecordDataModule for the keys.

    Args:
        loss_on: ``answer``, or ``text`` to learn the prompt as well.
    """

    forms = (Demonstration,)

    def __init__(self, *, loss_on: str = "answer", **keys: Any) -> None:
        super().__init__(**keys)
        self.check_choice("loss_on", loss_on, ("answer", "text"))
        self.loss_on = loss_on

    def encode(self, encoder: Encoder, record: Any) -> EncodedResponse:
        coded = encoder.encode_response(record.prompt.messages, record.response)
        # the first token has nothing before it to be predicted from
        return coded if self.loss_on == "answer" else EncodedResponse(coded.input_ids, 1)

    def length(self, row: Any) -> int:
        return len(row.input_ids)

    def collate(self, rows: list[Any]) -> SequenceBatch:
        return SequenceBatch.collate(rows)
