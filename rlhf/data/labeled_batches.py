"""Batches of sequences with labels: preferences or rewards."""

from dataclasses import dataclass

from torch import Tensor

from rlhf.data.batches import Batch, SequenceBatch


@dataclass
class LabeledBatch(Batch):
    """Base class of batches whose sequences have labels, such as preferences or rewards.

    Args:
        sequences: Prompts with responses.
    """

    sequences: SequenceBatch

    def scored_by_reference(self) -> dict[str, SequenceBatch]:
        """Return the sequences whose log-probs under the reference model are in the fields of these names."""
        return {}

    @property
    def token_count(self) -> int:
        return self.sequences.token_count

    @property
    def sequence_count(self) -> int:
        return self.sequences.sequence_count


@dataclass
class PairBatch(LabeledBatch):
    """Preference pairs. All chosen responses come first, then all rejected responses in the same order.

    Args:
        sequences: [2 * pairs, time] prompts with responses.
        margin: [pairs] by how much the chosen response is better, in reward units.
        ref_logprobs: [2 * pairs] summed log-probs of the responses under the reference model, in nats; None if they
            have not been precomputed.
        chosen_tokens: Number of tokens of the chosen responses; None to count them now.
    """

    counts = ("chosen_tokens",)

    margin: Tensor
    ref_logprobs: Tensor | None = None
    chosen_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.chosen_tokens is None:
            self.chosen_tokens = int(self.halves(self.sequences.response_mask)[0].sum())

    def scored_by_reference(self) -> dict[str, SequenceBatch]:
        return {"ref_logprobs": self.sequences}

    @property
    def row_count(self) -> int:
        return len(self.margin)

    def halves(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Split [2 * pairs, ...] values into those of the chosen and those of the rejected responses."""
        chosen, rejected = values.chunk(2)
        return chosen, rejected

    @property
    def loss_terms(self) -> int:
        return 0 if self.is_filler else len(self.margin)

    @property
    def sft_terms(self) -> int:
        return 0 if self.is_filler else self.chosen_tokens or 0


@dataclass
class UnpairedBatch(LabeledBatch):
    """Unpaired preferences: single responses with a label.

    Args:
        sequences: [batch, time] prompts with responses.
        desirable: [batch] bool, the label.
        mismatched: [batch, time'] each prompt with a response to another prompt.
        ref_logprobs: [batch] summed log-probs of the responses under the reference model, in nats; None if they have
            not been precomputed.
        mismatched_ref_logprobs: [batch] the same of the responses of ``mismatched``.
        desirable_rows: Number of desirable responses; None to count them now.
        desirable_tokens: Number of tokens of the desirable responses; None to count them now.
    """

    counts = ("desirable_rows", "desirable_tokens")

    desirable: Tensor
    mismatched: SequenceBatch
    ref_logprobs: Tensor | None = None
    mismatched_ref_logprobs: Tensor | None = None
    desirable_rows: int | None = None
    desirable_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.desirable_rows is None:
            self.desirable_rows = int(self.desirable.sum())
        if self.desirable_tokens is None:
            self.desirable_tokens = int(self.sequences.response_mask[self.desirable].sum())

    def scored_by_reference(self) -> dict[str, SequenceBatch]:
        return {"ref_logprobs": self.sequences, "mismatched_ref_logprobs": self.mismatched}

    @property
    def loss_terms(self) -> int:
        return 0 if self.is_filler else len(self.desirable)

    @property
    def sft_terms(self) -> int:
        return 0 if self.is_filler else self.desirable_tokens or 0


@dataclass
class RatingBatch(LabeledBatch):
    """Responses with rewards.

    Args:
        sequences: [batch, time] prompts with responses.
        rewards: [batch] rewards, in reward units.
    """

    rewards: Tensor

    @property
    def loss_terms(self) -> int:
        return 0 if self.is_filler else len(self.rewards)
