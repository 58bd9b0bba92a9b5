"""Batches, and how rows become one. All token tensors are [batch, time], padded on the right."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from typing_extensions import Self

from rlhf.data.encode import EncodedResponse
from rlhf.data.records import Prompt
from rlhf.tensors import pad_right


@dataclass(kw_only=True)
class Batch:
    """What every batch knows.

    loss_weight: this batch's part in the optimizer step, so that the mean over the step does not depend on how it was cut
        into batches: terms of the loss here x batches in the step / terms of the loss in the step.
    sft_loss_weight: the same for an SFT term that is added to the loss, whose terms are others.
    """

    loss_weight: float = 1.0
    sft_loss_weight: float = 1.0

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on a device; what is no tensor stays."""
        moved = {
            part.name: value.to(device)
            for part in fields(self)
            if isinstance(value := getattr(self, part.name), Tensor | Batch)
        }
        return replace(self, **moved)

    @property
    def loss_terms(self) -> int:
        """How many terms the mean of the loss is taken over: tokens or pairs."""
        raise NotImplementedError

    @property
    def sft_terms(self) -> int:
        """How many terms the mean of an added SFT term is taken over: tokens of the better answers."""
        return 0

    @property
    def token_count(self) -> int:
        """Real tokens, for throughput."""
        raise NotImplementedError

    @property
    def sequence_count(self) -> int:
        raise NotImplementedError


@dataclass
class SequenceBatch(Batch):
    """Prompts with answers.

    input_ids: [batch, time] token ids.
    attention_mask: [batch, time] bool, True on real tokens.
    response_mask: [batch, time] bool, True from the first token of the answer to its EOS.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    terms: int = 0

    @classmethod
    def collate(cls, rows: Sequence[EncodedResponse]) -> "SequenceBatch":
        input_ids, attention_mask = pad_right([row.input_ids for row in rows])
        starts = torch.tensor([row.start for row in rows])
        response_mask = attention_mask & (torch.arange(input_ids.shape[1]) >= starts[:, None])
        response_mask[:, 0] = False  # nothing stands before the first token
        return cls(input_ids, attention_mask, response_mask, terms=int(response_mask.sum()))

    @property
    def loss_terms(self) -> int:
        return self.terms

    @property
    def token_count(self) -> int:
        return int(self.attention_mask.sum())

    @property
    def sequence_count(self) -> int:
        return len(self.input_ids)


@dataclass
class LabeledBatch(Batch):
    """Texts about which the data say something more. sequences: [batch, time]."""

    sequences: SequenceBatch

    @property
    def token_count(self) -> int:
        return self.sequences.token_count

    @property
    def sequence_count(self) -> int:
        return self.sequences.sequence_count


@dataclass
class PairBatch(LabeledBatch):
    """Preference pairs, as one batch of 2 x pairs rows: first all chosen answers, then all rejected ones.

    sequences: [2 x pairs, time].
    margin: [pairs], reward units.
    ref_logprobs: [2 x pairs] summed log-probs of the answers under the reference, nats, where they are known already.
    """

    margin: Tensor
    ref_logprobs: Tensor | None = None

    def halves(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected part of [2 x pairs] values: [pairs] each."""
        chosen, rejected = values.chunk(2)
        return chosen, rejected

    @property
    def loss_terms(self) -> int:
        return len(self.margin)

    @property
    def sft_terms(self) -> int:
        return int(self.halves(self.sequences.response_mask)[0].sum())


@dataclass
class UnpairedBatch(LabeledBatch):
    """Answers labelled one by one.

    sequences: [batch, time].
    desirable: [batch] bool, the label.
    mismatched: [batch, time'], each prompt with the answer of another row.
    ref_logprobs: [batch] summed log-probs of the answers under the reference, nats, where they are known already.
    """

    desirable: Tensor
    mismatched: SequenceBatch
    ref_logprobs: Tensor | None = None

    @property
    def loss_terms(self) -> int:
        return len(self.desirable)

    @property
    def sft_terms(self) -> int:
        return int(self.sequences.response_mask[self.desirable].sum())


@dataclass
class RatingBatch(LabeledBatch):
    """Answers with what they are worth. rewards: [batch], reward units."""

    rewards: Tensor

    @property
    def loss_terms(self) -> int:
        return len(self.rewards)


@dataclass
class PromptBatch(Batch):
    """Prompts to answer. tokens: one list of token ids a prompt; prompts: the records they come from."""

    input_ids: list[list[int]]
    prompts: list[Prompt] = field(default_factory=list)

    @property
    def loss_terms(self) -> int:
        return len(self.input_ids)

    @property
    def token_count(self) -> int:
        return sum(map(len, self.input_ids))

    @property
    def sequence_count(self) -> int:
        return len(self.input_ids)
