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


class UnpaddedBatch:
    """Like ``DecodingBatch``, without padding: prompts of equal length are one batch, and batches take turns.

    Args:
        lm: Causal language model.
        places: Number of rows.
        capacity: Largest number of tokens of a row, which this class does not need to know.
    """

    can_refill = False

    def __init__(self, lm: PreTrainedModel, places: int, capacity: int) -> None:
        self.lm, self.count = lm, places
        self.parts: list[tuple[DecodingBatch, list[int]]] = []  # each batch and the rows that it decodes

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute the prompts of all rows; see ``DecodingBatch.prefill``."""
        for length in sorted(set(map(len, prompts))):
            mine = [row for row in rows if len(prompts[row]) == length]
            self.parts.append((DecodingBatch(self.lm, len(mine), 0), mine))
        return self._logits(lambda batch, mine: batch.prefill(range(len(mine)), [prompts[row] for row in mine]))

    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token to each row and return the logits of the next one: [rows] to [rows, vocabulary]."""
        return self._logits(lambda batch, mine: batch.decode(tokens[torch.tensor(mine, device=tokens.device)]))

    def _logits(self, compute: Callable[[DecodingBatch, list[int]], Tensor]) -> Tensor:
        """Compute the logits of each batch, and return those of all rows in order."""
        logits = torch.cat([compute(batch, mine) for batch, mine in self.parts])
        order = torch.tensor([row for _, mine in self.parts for row in mine], device=logits.device)
        return logits[order.argsort()]

    def remove(self, rows: Sequence[int]) -> list[int]:
        """Remove rows from the batch, and return the former indices of those that are left."""
        removed = set(rows)
        order = [row for row in range(self.count) if row not in removed]
        places = {row: place for place, row in enumerate(order)}
        parts = []
        for batch, mine in self.parts:
            if not removed.issuperset(mine):
                left = batch.remove([i for i, row in enumerate(mine) if row in removed])
                parts.append((batch, [places[mine[i]] for i in left]))
        self.parts, self.count = parts, len(order)
        return order
