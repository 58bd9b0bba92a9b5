"""Batches. All token tensors have shape [batch, time] and are padded on the right."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from rlhf.data.encoded import EncodedResponse
from rlhf.data.records import Prompt
from rlhf.tensors import pad_right


@dataclass(kw_only=True)
class Batch:
    """Base class of all batches.

    The weights make the mean over an optimizer step independent of how the step is divided into batches and ranks:

        weight = terms in this batch * batches per step / terms in the step

    Args:
        loss_weight: Factor of the loss; its terms are ``loss_terms``.
        sft_loss_weight: Factor of an SFT loss that a stage adds to its own; its terms are ``sft_terms``.
        is_filler: Whether the batch repeats rows of another batch only so that its rank does not miss a step. Such a
            batch has no terms, so neither the loss nor any metric depends on it.
        rows: Where each row is in the data, from 0; empty if that is not known.
        indices: Which of the encoded rows these are; empty if that is not known.
    """

    counts: ClassVar[tuple[str, ...]] = ()  # Fields that are counted from the others where they are None.

    loss_weight: float = 1.0
    sft_loss_weight: float = 1.0
    is_filler: bool = False
    rows: list[int | None] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)

    def to(self, device: torch.device | str) -> Self:
        """Return a copy of the batch with its tensors on a device."""
        moved: dict[str, Any] = {
            item.name: value.to(device) if isinstance(value, Batch) else value.to(device, non_blocking=value.is_cpu)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor | Batch)
        }
        return replace(self, **moved)

    def as_filler(self) -> Self:
        """Return a copy of the batch without terms."""
        inner: dict[str, Any] = {
            item.name: value.as_filler()
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Batch)
        }
        return replace(self, loss_weight=0.0, sft_loss_weight=0.0, is_filler=True, **inner)

    def select(self, rows: Sequence[int]) -> Self:
        """Return a batch of some rows, with weights in proportion to its terms.

        If batches share out all rows of this one, the sum of their weighted losses is the weighted loss of this one.

        Args:
            rows: Indices of the rows.
        """
        changed: dict[str, Any] = dict(self.recount(rows))
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor | Batch | list):
                length = value.row_count if isinstance(value, Batch) else len(value)
                # The chosen responses of pairs come first, then the rejected ones.
                index = [start + row for start in range(0, length, self.row_count) for row in rows]
                changed[item.name] = (
                    value.select(index)
                    if isinstance(value, Batch)
                    else value[index]
                    if isinstance(value, Tensor)
                    else [value[i] for i in index]
                )
        selected = replace(self, **changed)
        selected.loss_weight *= selected.loss_terms / max(self.loss_terms, 1)
        selected.sft_loss_weight *= selected.sft_terms / max(self.sft_terms, 1)
        return selected

    def recount(self, rows: Sequence[int]) -> dict[str, int | None]:
        """Return the counts of some rows by field; None: counted when the batch of these rows is made."""
        return dict.fromkeys(self.counts)

    @property
    def row_count(self) -> int:
        """Number of rows: of records, or of sampled responses."""
        return self.sequence_count

    @property
    def loss_terms(self) -> int:
        """Number of terms that the loss is averaged over, such as tokens or pairs; 0 for a filler batch."""
        raise NotImplementedError

    @property
    def sft_terms(self) -> int:
        """Number of terms of an added SFT loss: tokens of the chosen or desirable responses."""
        return 0

    @property
    def token_count(self) -> int:
        """Number of real tokens, for throughput."""
        raise NotImplementedError

    @property
    def sequence_count(self) -> int:
        """Number of sequences, for throughput."""
        raise NotImplementedError


@dataclass
class SequenceBatch(Batch):
    """Prompts with responses.

    Args:
        input_ids: [batch, time] token ids.
        attention_mask: [batch, time] bool, True on real tokens.
        response_mask: [batch, time] bool, True on response tokens including EOS; in SFT, on the tokens to learn.
        terms: Number of True entries of ``response_mask``; None to count them now.
        tokens: Number of True entries of ``attention_mask``; None to count them now.
        lengths: Number of tokens of each row; empty to count them now.
        shared_tokens: For each row of a batch of pairs, the number of leading tokens that both sequences of its pair
            have in common; empty if that is not known.
    """

    counts = ("terms", "tokens")

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    terms: int | None = None
    tokens: int | None = None
    lengths: list[int] = field(default_factory=list)
    shared_tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Counted here, before the batch moves to a device: each read from a device waits for its computations.
        if self.terms is None:
            self.terms = int(self.response_mask.sum())
        if not self.lengths:
            self.lengths = self.attention_mask.sum(dim=1).tolist()
        if self.tokens is None:
            self.tokens = sum(self.lengths)

    @classmethod
    def collate(cls, rows: Sequence[EncodedResponse]) -> "SequenceBatch":
        """Pad rows on the right and compute their masks."""
        input_ids, attention_mask = pad_right([row.input_ids for row in rows])
        response_mask = torch.zeros_like(attention_mask)
        for row, mask in zip(rows, response_mask, strict=True):
            for begin, end in row.spans:
                mask[max(begin, 1) : end] = True  # nothing precedes the first token, so it cannot be predicted
        return cls(input_ids, attention_mask, response_mask)

    @property
    def inputs(self) -> dict[str, Any]:
        """The keywords with which ``rlhf.models.Policy`` computes the log-probs of the responses."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "response_mask": self.response_mask,
            "response_tokens": self.terms,
            **self.layout,
        }

    @property
    def layout(self) -> dict[str, list[int]]:
        """What models may know about the rows, as keywords of ``rlhf.models.hidden_states``."""
        return {"lengths": self.lengths, "shared_tokens": self.shared_tokens}

    @property
    def loss_terms(self) -> int:
        return 0 if self.is_filler else self.terms or 0

    @property
    def token_count(self) -> int:
        return self.tokens or 0

    @property
    def sequence_count(self) -> int:
        return len(self.input_ids)


@dataclass
class PromptBatch(Batch):
    """Prompts to sample responses for.

    Args:
        input_ids: A list of token ids per prompt, without padding.
        prompts: The record of each prompt.
    """

    input_ids: list[list[int]]
    prompts: list[Prompt] = field(default_factory=list)

    def repeat(self, count: int) -> Self:
        """Repeat each prompt ``count`` times, in adjacent rows: one row for each response."""
        return self.select([row for row in range(self.row_count) for _ in range(count)])

    @property
    def loss_terms(self) -> int:
        return 0 if self.is_filler else len(self.input_ids)

    @property
    def token_count(self) -> int:
        return sum(map(len, self.input_ids))

    @property
    def sequence_count(self) -> int:
        return len(self.input_ids)
