"""From records to tokens: prompt and answer in one encoding, one BOS, an EOS that is learned."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Message
from rlhf.errors import UserError


@dataclass(frozen=True)
class EncodedResponse:
    """Tokens of a prompt and its answer; the answer begins at ``start`` and ends with EOS unless it was cut."""

    input_ids: list[int]
    start: int


class Encoder:
    """Joins prompts and answers by the tokenizer's chat template and turns them into tokens.

    Args:
        tokenizer: carries a chat template.
        max_length: longest prompt with answer, tokens. What is longer loses the beginning of its prompt first; only an
            answer that is too long by itself is cut, and then does not end in EOS.

    ``counts`` says how many prompts and answers were cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.counts: Counter[str] = Counter()
        self._bos = tokenizer.bos_token_id
        self._adds_bos = self._bos is not None and self._encode("x", special=True)[0][:1] == [self._bos]

    def encode_prompt(self, messages: Sequence[Message], *, room: int = 0) -> list[int]:
        """Tokens of a prompt, ready to be answered; ``room`` tokens of max_length are kept free for the answer."""
        input_ids = self._one_bos(self._encode(self._render(messages, response=None))[0])
        self.counts["prompts cut"] += len(input_ids) > self.max_length - room
        return self._cut_prompt(input_ids, self.max_length - room)

    def encode_response(self, messages: Sequence[Message], response: str) -> EncodedResponse:
        """Tokens of a prompt and its answer, encoded as one text."""
        return self.encode_responses(messages, [response])[0]

    def encode_responses(self, messages: Sequence[Message], responses: Sequence[str]) -> list[EncodedResponse]:
        """Tokens of a prompt with each of several answers; where the prompt must be cut, it is cut alike for all."""
        opening = self._render(messages, response=None)
        parts = [self._parts(opening, self._render(messages, response=response)) for response in responses]
        longest = max(len(reply) for _, reply in parts)
        if longest > self.max_length - 1:
            self.counts["answers cut"] += sum(len(reply) > self.max_length - 1 for _, reply in parts)
            longest = self.max_length - 1
        room = self.max_length - longest
        self.counts["prompts cut"] += any(len(prompt) > room for prompt, _ in parts)
        coded = []
        for prompt, reply in parts:
            prompt = self._cut_prompt(prompt, room)
            coded.append(EncodedResponse(prompt + reply[: self.max_length - 1], len(prompt)))
        return coded

    def _parts(self, opening: str, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a whole text, parted where the answer begins."""
        boundary = len(opening) if text.startswith(opening) else _shared_prefix(opening, text)
        input_ids, ends = self._encode(text)
        # a token that straddles the boundary already speaks of the answer
        start = next((i for i, end in enumerate(ends) if end > boundary), len(input_ids))
        return self._one_bos(input_ids[:start]), self._one_eos(input_ids[start:])

    def _render(self, messages: Sequence[Message], response: str | None) -> str:
        conversation = list(messages) if response is None else [*messages, {"role": "assistant", "content": response}]
        try:
            return str(
                self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=response is None)
            )
        except Exception as error:  # templates raise whatever their author wrote
            raise UserError(
                f"the tokenizer's chat template refuses a conversation of {[m['role'] for m in conversation]}: {error}",
                'another template: data.template="{prompt}\\n"',
            ) from error

    def _encode(self, text: str, special: bool = False) -> tuple[list[int], list[int]]:
        """Tokens of a text, and for each the place in the text where it ends."""
        if self.tokenizer.is_fast:
            coded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
            return list(coded["input_ids"]), [end for _, end in coded["offset_mapping"]]
        input_ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        return input_ids, [len(self.tokenizer.decode(input_ids[: i + 1])) for i in range(len(input_ids))]

    def _one_bos(self, prompt: list[int]) -> list[int]:
        """Exactly one BOS for a tokenizer or template that uses it, and none for others."""
        count = 0
        while self._bos is not None and count < len(prompt) and prompt[count] == self._bos:
            count += 1
        return [self._bos] * (count > 0 or self._adds_bos) + prompt[count:]

    def _one_eos(self, response: list[int]) -> list[int]:
        """The answer up to its closing EOS; what a template writes after that (a line feed) is left off."""
        eos = self.tokenizer.eos_token_id
        last = max((i for i, token in enumerate(response) if token == eos), default=None)
        if last is not None and not self.tokenizer.decode(response[last + 1 :]).strip():
            return response[: last + 1]
        return [*response, eos]

    def _cut_prompt(self, prompt: list[int], room: int) -> list[int]:
        return _cut_prompt(prompt, room, self._bos)


def concatenate(one: EncodedResponse, other: EncodedResponse, max_length: int, bos: int | None) -> EncodedResponse:
    """The prompt of one text with the answer of another, for texts that nobody wrote; the prompt is cut to fit."""
    response = other.input_ids[other.start :]
    prompt = _cut_prompt(one.input_ids[: one.start], max_length - len(response), bos)
    return EncodedResponse(prompt + response, len(prompt))


def _cut_prompt(prompt: list[int], room: int, bos: int | None) -> list[int]:
    """The end of a prompt, with its BOS: what was said last matters most to the answer."""
    if len(prompt) <= room:
        return prompt
    opening = prompt[:1] if prompt[:1] == [bos] else []
    return opening + prompt[len(prompt) - (room - len(opening)) :]


def _shared_prefix(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
