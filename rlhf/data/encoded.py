"""Encoded texts: token ids, with the tokens of a response or of each assistant message."""

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

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where the tokens to learn begin and end."""
        return [(self.start, len(self.input_ids))]


@dataclass(frozen=True)
class EncodedConversation(EncodedResponse):
    """Token ids of a conversation that ends with a response, of which all assistant messages are learned.

    Args:
        earlier: Where the assistant messages before the response begin and end, one after the other: ``[2, 5, 9, 12]``
            for the tokens 2 to 4 and 9 to 11.
    """

    earlier: list[int]

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [*zip(self.earlier[::2], self.earlier[1::2], strict=True), *super().spans]


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

    def end_token(self, position: int) -> int:
        """Return the index after the last token that begins before a position in the text, which must be positive."""
        token = self.first_token(position - 1)
        while token < len(self.input_ids) and self._begin(token) < position:
            token += 1
        return token

    def _begin(self, token: int) -> int:
        if self.encoding is None:
            return self.ends[token - 1] if token > 0 else 0
        begin: int = self.encoding.token_to_chars(token)[0]
        return begin


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
