"""Data of all stages: files to records, records to token ids, token ids to batches of similar length."""

from rlhf.data.batches import Batch, PromptBatch, SequenceBatch
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.encode import Encoder
from rlhf.data.encoded import EncodedConversation, EncodedResponse, replace_response
from rlhf.data.labeled_batches import PairBatch, RatingBatch, UnpairedBatch
from rlhf.data.loader import BatchLoader
from rlhf.data.preference import PreferenceDataModule
from rlhf.data.prompts import PromptDataModule
from rlhf.data.records import Demonstration, Message, Preference, Prompt, Rating, UnpairedPreference
from rlhf.data.unpaired import UnpairedDataModule

__all__ = [
    "Batch",
    "BatchLoader",
    "Demonstration",
    "EncodedConversation",
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
    "UnpairedDataModule",
    "UnpairedPreference",
    "replace_response",
]
