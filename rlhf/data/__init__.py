"""From files to batches: records, one joint encoding, length-bucketed batches."""

from rlhf.data.batches import Batch, PairBatch, PromptBatch, RatingBatch, TextBatch, VerdictBatch
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.encode import EncodedAnswer, Encoder, join
from rlhf.data.loader import BatchLoader
from rlhf.data.preference import PreferenceDataModule
from rlhf.data.prompts import PromptRecordDataModule
from rlhf.data.records import Demonstration, Message, Preference, Prompt, Rating, Verdict

__all__ = [
    "Batch",
    "BatchLoader",
    "Demonstration",
    "EncodedAnswer",
    "Encoder",
    "Message",
    "PairBatch",
    "Preference",
    "PreferenceDataModule",
    "Prompt",
    "PromptBatch",
    "PromptRecordDataModule",
    "Rating",
    "RatingBatch",
    "RecordDataModule",
    "TextBatch",
    "Verdict",
    "VerdictBatch",
    "join",
]
