"""Decoding of models whose responses would depend on padding before the prompt."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.sampling.decoding import DecodingBatch


def padding_reaches_state(lm: nn.Module) -> bool:
    """Return whether a recurrent layer of a model would read padding before the prompt.

    transformers sets the input of the first projection to zero there. If the projection has a bias, its output is not
    zero, and the convolution after it mixes padding with the first tokens of the prompt.
    """
    return any(
        getattr(getattr(part, "in_proj", None), "bias", None) is not None
        and any(isinstance(child, nn.Conv1d) for child in part.children())
        for part in lm.modules()
    )


def groups_of_equal_length(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the indices of the prompts of each length."""
    lengths = [len(prompt) for prompt in prompts]
    return [[i for i, other in enumerate(lengths) if other == length] for length in sorted(set(lengths))]


def in_order(parts: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
    """Join what was computed for groups of rows: [rows of the group, ...] each to [all rows, ...]."""
    joined = torch.cat(list(parts))
    return joined[torch.tensor([row for group in groups for row in group], device=joined.device).argsort()]


class UnpaddedBatch:
    """Like ``DecodingBatch``, without padding: prompts of equal length are one batch, and batches take turns.

    Args:
        lm: Causal language model.
        max_rows: Number of rows.
        capacity: Largest number of tokens of a row.
    """

    can_refill = False

    def __init__(self, lm: PreTrainedModel, max_rows: int, capacity: int) -> None:
        self.lm, self.count, self.capacity = lm, max_rows, capacity
        self.parts: list[tuple[DecodingBatch, list[int]]] = []  # each batch and the rows that it decodes

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute the prompts of all rows; see ``DecodingBatch.prefill``."""
        groups = groups_of_equal_length(prompts)
        self.parts = [(DecodingBatch(self.lm, len(mine), self.capacity), mine) for mine in groups]
        return self._logits(lambda batch, mine: batch.prefill(range(len(mine)), [prompts[row] for row in mine]))

    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token to each row and return the logits of the next one: [rows] to [rows, vocabulary]."""
        return self._logits(lambda batch, mine: batch.decode(tokens[torch.tensor(mine, device=tokens.device)]))

    def _logits(self, compute: Callable[[DecodingBatch, list[int]], Tensor]) -> Tensor:
        """Compute the logits of each batch, and return those of all rows in order."""
        return in_order([compute(batch, mine) for batch, mine in self.parts], [mine for _, mine in self.parts])

    def remove(self, rows: Sequence[int]) -> list[int]:
        """Remove rows from the batch, and return the former indices of those that are left."""
        removed = set(rows)
        order = [row for row in range(self.count) if row not in removed]
        new_index = {row: index for index, row in enumerate(order)}
        parts = []
        for batch, mine in self.parts:
            if not removed.issuperset(mine):
                left = batch.remove([i for i, row in enumerate(mine) if row in removed])
                parts.append((batch, [new_index[mine[i]] for i in left]))
        self.parts, self.count = parts, len(order)
        return order
