"""Encoded texts: token ids, and where a response begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EncodedResponse:
    """Token ids of a prompt followed by a response.

    Args:
        input_ids: Token ids. The last one is EOS, unless the response was truncated.
        start: Index of the first token of the response.
    """

    input_ids: list[int]
    start: int


@dataclass(frozen=True)
class EncodedText:
    """A complete text with its token ids.

    Args:
        text: The text.
        input_ids: Its token ids.
        encoding: What a tokenizer of the ``tokenizers`` library returned for it; None for others.
        ends: For each token the index in the text where it ends; empty if ``encoding`` has them.
    """

    text: str
    input_ids: list[int]
    encoding: Any = None
    ends: Sequence[int] = ()

    def first_token(self, position: int) -> int:
        """Return the index of the first token that ends after a position in the text."""
        if self.encoding is not None:
            token: int | None = self.encoding.char_to_token(position)
            if token is not None:
                return token
        # The tokenizer removed the character at this position.
        ends = self.ends if self.encoding is None else [end for _, end in self.encoding.offsets]
        return next((i for i, end in enumerate(ends) if end > position), len(self.input_ids))


def replace_response(
    row: EncodedResponse, other: EncodedResponse, max_length: int, bos_token_id: int | None
) -> EncodedResponse:
    """Combine the prompt of one row with the response of another; the prompt is truncated to fit ``max_length``."""
    response = other.input_ids[other.start :]
    prompt = keep_end(row.input_ids[: row.start], max_length - len(response), bos_token_id)
    return EncodedResponse(prompt + response, len(prompt))


def keep_end(prompt: list[int], limit: int, bos: int | None) -> list[int]:
    """Truncate a prompt to its last tokens, which matter most to the response, and keep its BOS."""
    if len(prompt) <= limit:
        return prompt
    opening = prompt[:1] if prompt[:1] == [bos] else []
    return opening + prompt[len(prompt) - (limit - len(opening)) :]
