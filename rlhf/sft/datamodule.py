"""Demonstrations as batches."""

from typing import Any

from rlhf.data import Demonstration, EncodedAnswer, Encoder, RecordDataModule, TextBatch


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

    def encode(self, encoder: Encoder, record: Any) -> EncodedAnswer:
        coded = encoder.answer(record.prompt.messages, record.answer)
        # the first token has nothing before it to be predicted from
        return coded if self.loss_on == "answer" else EncodedAnswer(coded.tokens, 1)

    def length(self, row: Any) -> int:
        return len(row.tokens)

    def collate(self, rows: list[Any]) -> TextBatch:
        return TextBatch.collate(rows)
