"""From files to batches: records, one joint encoding, length-bucketed batches."""

from rlhf.data.batches import Batch, PairBatch, PromptBatch, RatingBatch, SequenceBatch, UnpairedBatch
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.encode import EncodedResponse, Encoder, concatenate
from rlhf.data.loader import BatchLoader
from rlhf.data.preference import PreferenceDataModule
from rlhf.data.prompts import PromptDataModule
from rlhf.data.records import Demonstration, Message, Preference, Prompt, Rating, UnpairedPreference

__all__ = [
    "Batch",
    "BatchLoader",
    "Demonstration",
    "EncodedResponse",
    "Encoder",
    "Message",
    "PairBatch",
    "Preference",
    "PreferenceDataModule",
    "Prompt",
    "PromptBatch",
    "PromptDataModule",
    "Rating",
    "RatingBatch",
    "RecordDataModule",
    "SequenceBatch",
    "UnpairedBatch",
    "UnpairedPreference",
    "concatenate",
]
