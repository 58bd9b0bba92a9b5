"""Batches, and how rows become one. All token tensors are [batch, time], padded on the right."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from typing_extensions import Self

from rlhf.data.encode import EncodedAnswer
from rlhf.data.records import Prompt
from rlhf.tensors import pad_right


@dataclass(kw_only=True)
class Batch:
    """What every batch knows.

    share: this batch's part in the optimizer step, so that the mean over the step does not depend on how it was cut
        into batches: terms of the loss here x batches in the step / terms of the loss in the step.
    sft_share: the same for an SFT term that is added to the loss, whose terms are others.
    """

    share: float = 1.0
    sft_share: float = 1.0

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
class TextBatch(Batch):
    """Prompts with answers.

    tokens: [batch, time] token ids.
    mask: [batch, time] bool, True on real tokens.
    answer: [batch, time] bool, True from the first token of the answer to its EOS.
    """

    tokens: Tensor
    mask: Tensor
    answer: Tensor
    terms: int = 0

    @classmethod
    def collate(cls, rows: Sequence[EncodedAnswer]) -> "TextBatch":
        tokens, mask = pad_right([row.tokens for row in rows])
        starts = torch.tensor([row.start for row in rows])
        answer = mask & (torch.arange(tokens.shape[1]) >= starts[:, None])
        answer[:, 0] = False  # nothing stands before the first token
        return cls(tokens, mask, answer, terms=int(answer.sum()))

    @property
    def loss_terms(self) -> int:
        return self.terms

    @property
    def token_count(self) -> int:
        return int(self.mask.sum())

    @property
    def sequence_count(self) -> int:
        return len(self.tokens)


@dataclass
class JudgedBatch(Batch):
    """Texts about which the data say something more. texts: [batch, time]."""

    texts: TextBatch

    @property
    def token_count(self) -> int:
        return self.texts.token_count

    @property
    def sequence_count(self) -> int:
        return self.texts.sequence_count


@dataclass
class PairBatch(JudgedBatch):
    """Preference pairs, as one batch of 2 x pairs rows: first all chosen answers, then all rejected ones.

    texts: [2 x pairs, time].
    margin: [pairs], reward units.
    reference: [2 x pairs] summed log-probs of the answers under the reference, nats, where they are known already.
    """

    margin: Tensor
    reference: Tensor | None = None

    def halves(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected part of [2 x pairs] values: [pairs] each."""
        chosen, rejected = values.chunk(2)
        return chosen, rejected

    @property
    def loss_terms(self) -> int:
        return len(self.margin)

    @property
    def sft_terms(self) -> int:
        return int(self.halves(self.texts.answer)[0].sum())


@dataclass
class VerdictBatch(JudgedBatch):
    """Answers labelled one by one.

    texts: [batch, time].
    desirable: [batch] bool, the label.
    mismatched: [batch, time'], each prompt with the answer of another row.
    reference: [batch] summed log-probs of the answers under the reference, nats, where they are known already.
    """

    desirable: Tensor
    mismatched: TextBatch
    reference: Tensor | None = None

    @property
    def loss_terms(self) -> int:
        return len(self.desirable)

    @property
    def sft_terms(self) -> int:
        return int(self.texts.answer[self.desirable].sum())


@dataclass
class RatingBatch(JudgedBatch):
    """Answers with what they are worth. rewards: [batch], reward units."""

    rewards: Tensor

    @property
    def loss_terms(self) -> int:
        return len(self.rewards)


@dataclass
class PromptBatch(Batch):
    """Prompts to answer. tokens: one list of token ids a prompt; prompts: the records they come from."""

    tokens: list[list[int]]
    prompts: list[Prompt] = field(default_factory=list)

    @property
    def loss_terms(self) -> int:
        return len(self.tokens)

    @property
    def token_count(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def sequence_count(self) -> int:
        return len(self.tokens)
