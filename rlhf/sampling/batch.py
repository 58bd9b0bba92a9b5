"""The interface of the decoders."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class DecodingBatch(Protocol):
    """The rows of a batch that are being decoded, and their cache.

    Attributes:
        count: Number of rows.
    """

    count: int

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute prompts and place each of them in a row.

        Args:
            rows: The rows, which are unused or finished.
            prompts: Token ids of the prompt of each row, at least one per prompt.

        Returns:
            [rows, vocabulary] logits of the first token of each response.
        """

    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token to each row and return the logits of the next one: [rows] to [rows, vocabulary]."""

    def rewind(self, rows: Sequence[int]) -> None:
        """Reset finished rows that wait for a prompt, if they would overflow the cache or slow down decoding."""
        return  # Only caches that grow with each token need this.

    def remove(self, rows: Sequence[int]) -> list[int]:
        """Remove rows from the batch.

        Args:
            rows: The rows, in ascending order.

        Returns:
            The former index of each row that is left.
        """
