"""How the sequences of a batch are arranged in the rows that a trunk computes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from rlhf.tensors import upload

# Number of tokens of a prompt and of the remainder of each sequence. A row with one sequence has no second remainder.
Sizes: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class Layout(ABC):
    """An arrangement of a batch in rows. Its tensors are on the CPU unless noted otherwise.

    Args:
        sizes: The sizes of each row.

    Attributes:
        needs_mask: Whether padded rows need an attention mask. Without one, attention is causal.
    """

    sizes: Sequence[Sizes]
    needs_mask: ClassVar[bool]

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return [sum(sizes) for sizes in self.sizes]

    @property
    @abstractmethod
    def rows(self) -> Tensor:
        """[batch] the row of each sequence."""

    @abstractmethod
    def columns(self, time: int) -> Tensor:
        """Return the index in its row of each token of the batch: [batch, time], undefined at padding.

        Args:
            time: Width of the batch.
        """

    @abstractmethod
    def tokens(self, input_ids: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the token ids of some rows and their positions: [rows, width] each, on the device of the batch.

        Args:
            input_ids: [batch, time] token ids, padded on the right.
            rows: [rows] the rows to return.
            width: Number of tokens of the longest row among them.
        """

    @abstractmethod
    def visible(self, rows: Tensor, width: int, device: torch.device) -> Tensor:
        """Return which tokens see which: [1 or rows, width, width] bool, queries before keys.

        Args:
            rows: See ``tokens``, as for ``width``.
            width: See above.
            device: The device of the result.
        """

    @abstractmethod
    def padded_hidden_states(self, trunk: Any, input_ids: Tensor, rows: Tensor, width: int) -> Tensor:
        """Compute the last hidden states of some rows, padded on the right: [rows, width, width of a state].

        Args:
            trunk: A causal model without its output layer.
            input_ids: See ``tokens``, as for the other arguments.
            rows: See above.
            width: See above.
        """


class SeparateRows(Layout):
    """Each sequence has its row."""

    needs_mask = False

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "SeparateRows":
        """Return the layout of sequences with these numbers of tokens."""
        return cls([(0, length, 0) for length in lengths])

    @property
    def rows(self) -> Tensor:
        return torch.arange(len(self.sizes))

    def columns(self, time: int) -> Tensor:
        return torch.arange(time).expand(len(self.sizes), -1)

    def tokens(self, input_ids: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        tokens = input_ids[upload(rows, input_ids.device), :width]
        return tokens, torch.arange(width, device=input_ids.device).expand_as(tokens)

    def visible(self, rows: Tensor, width: int, device: torch.device) -> Tensor:
        return torch.ones(1, width, width, dtype=torch.bool, device=device).tril()

    def padded_hidden_states(self, trunk: Any, input_ids: Tensor, rows: Tensor, width: int) -> Tensor:
        tokens, _ = self.tokens(input_ids, rows, width)
        states: Tensor = trunk(input_ids=tokens, use_cache=False).last_hidden_state
        return states


class SharedPrompts(Layout):
    """Each pair has a row: the prompt, which is computed once, followed by the remainder of each sequence.

    A token of the second sequence sees the prompt and its own sequence only, and its position continues from the end
    of the prompt. In the batch, the first sequences of all pairs precede the second ones.
    """

    needs_mask = True

    @property
    def rows(self) -> Tensor:
        return torch.arange(len(self.sizes)).repeat(2)

    def columns(self, time: int) -> Tensor:
        prompt, first, _ = torch.tensor(self.sizes).T[:, :, None]
        token = torch.arange(time).expand(len(self.sizes), -1)
        return torch.cat([token, torch.where(token < prompt, token, token + first)])

    def tokens(self, input_ids: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        prompt, first, token = self._sizes_and_columns(rows, width, input_ids.device)
        sequence = upload(rows, input_ids.device)[:, None]
        is_second = token >= prompt + first
        position = torch.where(is_second, token - first, token).clamp(max=input_ids.shape[1] - 1)
        return input_ids[torch.where(is_second, sequence + len(self.sizes), sequence), position], position

    def visible(self, rows: Tensor, width: int, device: torch.device) -> Tensor:
        prompt, first, token = self._sizes_and_columns(rows, width, device)
        # A token that is neither in the prompt nor in the first sequence is in the second one, or padding.
        hidden = (token >= prompt + first)[:, :, None] & ((token >= prompt) & (token < prompt + first))[:, None]
        return (token <= token[:, None]) & ~hidden

    def padded_hidden_states(self, trunk: Any, input_ids: Tensor, rows: Tensor, width: int) -> Tensor:
        tokens, positions = self.tokens(input_ids, rows, width)
        mask = self.visible(rows, width, input_ids.device)[:, None]
        states: Tensor = trunk(
            input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return states

    def _sizes_and_columns(self, rows: Tensor, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sizes of prompts and first sequences, [rows, 1] each, and the columns of tokens, [width]."""
        prompt, first, _ = upload(torch.tensor(self.sizes)[rows], device).T[:, :, None]
        return prompt, first, torch.arange(width, device=device)
