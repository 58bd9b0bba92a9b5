"""Text of a response while its tokens arrive."""

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what decoding writes for bytes that are not a complete character


class TokenText:
    """Decodes the tokens of a response one by one.

    A character may consist of several tokens of a byte-level tokenizer. It is held back until it is complete. Only the
    last few tokens are decoded in each step, together with those before them, because some tokenizers decode a token
    differently at the beginning of a text.

    Args:
        tokenizer: The tokenizer that decodes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.input_ids: list[int] = []
        self._text = ""  # of all tokens before `_read`
        self._context, self._read = 0, 0  # Tokens from `_context` are decoded; the text before `_read` is complete.

    def append(self, token: int) -> None:
        """Add the next token of the response."""
        self.input_ids.append(token)
        if (text := self._new_text()) and not text.endswith(INCOMPLETE):
            self._text += text
            self._context, self._read = self._read, len(self.input_ids)

    @property
    def text(self) -> str:
        """The complete characters so far, without special tokens and without leading or trailing whitespace."""
        return (self._text + self._new_text().rstrip(INCOMPLETE)).strip()

    def final(self) -> str:
        """Return the text of all tokens, as ``Rollout.decode`` does."""
        return self._decode(self.input_ids).strip()

    def _new_text(self) -> str:
        """Return the text of the tokens that are not part of ``_text``."""
        before, after = (self._decode(self.input_ids[self._context : end]) for end in (self._read, None))
        return after[len(before) :]

    def _decode(self, input_ids: list[int]) -> str:
        return str(self.tokenizer.decode(input_ids, skip_special_tokens=True))
