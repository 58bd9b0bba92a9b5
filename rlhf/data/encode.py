"""Encode records as token ids: prompt and response as one text, with one BOS and a final EOS that is learned."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Message
from rlhf.errors import ConfigError, UserError
from rlhf.time_limit import time_limit
from rlhf.tokenizer_probe import encoding

RENDER_SECONDS = 10  # for one conversation, which usually takes a fraction of a millisecond


@dataclass(frozen=True)
class EncodedResponse:
    """Token ids of a prompt followed by a response.

    Args:
        input_ids: Token ids. The last one is EOS, unless the response was truncated.
        start: Index of the first token of the response.
    """

    input_ids: list[int]
    start: int


class Encoder:
    """Renders prompts and responses with the tokenizer's chat template and encodes them.

    Args:
        tokenizer: A tokenizer with a chat template.
        max_length: Maximum length of prompt and response together, in tokens. Longer sequences lose the beginning of
            the prompt. A response that alone is longer than ``max_length - 1`` is truncated as well, without an EOS.

    Attributes:
        counts: Number of ``truncated_prompts`` and ``truncated_responses`` so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.counts: Counter[str] = Counter()
        self._prepared: dict[tuple[int, str | None], tuple[str, list[int], list[int]]] = {}
        self._ids: dict[int, int] = {}  # one object for each token id, so that rows take 8 bytes per token, not 36
        self._bos: int | None = tokenizer.bos_token_id
        self._adds_bos = self._bos is not None and self._encode("x", special=True)[0][:1] == [self._bos]

    def prepare(self, conversations: Sequence[tuple[Sequence[Message], str | None]]) -> None:
        """Encode many conversations at once, which is faster, for the following calls of this object.

        Results do not depend on whether a conversation has been prepared. Those of the previous call are forgotten.

        Args:
            conversations: Messages of a prompt with a response, or with None for the prompt alone.
        """
        self._prepared.clear()
        if not self.tokenizer.is_fast or not conversations:
            return
        texts = [self._render(messages, response) for messages, response in conversations]
        with encoding():
            encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        columns = zip(conversations, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for (messages, response), text, input_ids, offsets in columns:
            self._prepared[id(messages), response] = text, input_ids, [end for _, end in offsets]

    def encode_prompt(self, messages: Sequence[Message], *, reserve: int = 0) -> list[int]:
        """Encode a prompt up to the point where the response begins.

        Args:
            messages: The conversation.
            reserve: Number of tokens of ``max_length`` to keep free for the response.
        """
        _, input_ids, _ = self._rendered(messages, None)
        input_ids = self._one_bos(self._shared(input_ids))
        limit = self.max_length - reserve
        self.counts["truncated_prompts"] += len(input_ids) > limit
        return _keep_end(input_ids, limit, self._bos)

    def encode_response(self, messages: Sequence[Message], response: str) -> EncodedResponse:
        """Encode a prompt and a response as one text."""
        return self.encode_responses(messages, [response])[0]

    def encode_responses(self, messages: Sequence[Message], responses: Sequence[str]) -> list[EncodedResponse]:
        """Encode a prompt with each of several responses.

        If the prompt must be truncated, the longest response decides and all responses get the same prompt: otherwise,
        the prompt would reveal which of them is the longer one.
        """
        opening = self._render(messages, response=None)
        pairs = [self._split(opening, *self._rendered(messages, response)) for response in responses]
        longest = max(len(response) for _, response in pairs)
        if longest > self.max_length - 1:
            self.counts["truncated_responses"] += sum(len(response) > self.max_length - 1 for _, response in pairs)
            longest = self.max_length - 1
        limit = self.max_length - longest
        self.counts["truncated_prompts"] += any(len(prompt) > limit for prompt, _ in pairs)
        encoded = []
        for prompt, response in pairs:
            prompt = _keep_end(prompt, limit, self._bos)
            encoded.append(EncodedResponse(prompt + response[: self.max_length - 1], len(prompt)))
        return encoded

    def _split(self, opening: str, text: str, input_ids: list[int], ends: list[int]) -> tuple[list[int], list[int]]:
        """Split the token ids of a complete text where the response begins."""
        boundary = len(opening) if text.startswith(opening) else _common_prefix_length(opening, text)
        input_ids = self._shared(input_ids)
        # A token that spans the boundary counts as part of the response.
        start = next((i for i, end in enumerate(ends) if end > boundary), len(input_ids))
        return self._one_bos(input_ids[:start]), self._one_eos(input_ids[start:])

    def _shared(self, input_ids: list[int]) -> list[int]:
        return [self._ids.setdefault(token, token) for token in input_ids]

    def _rendered(self, messages: Sequence[Message], response: str | None) -> tuple[str, list[int], list[int]]:
        """Return the text of a conversation, its token ids, and for each token the index in the text where it ends."""
        prepared = self._prepared.get((id(messages), response))
        if prepared is None:
            text = self._render(messages, response)
            return text, *self._encode(text)
        return prepared

    def _render(self, messages: Sequence[Message], response: str | None) -> str:
        conversation = list(messages) if response is None else [*messages, {"role": "assistant", "content": response}]
        try:
            with time_limit(RENDER_SECONDS, _slow_template()):
                return str(
                    self.tokenizer.apply_chat_template(
                        conversation, tokenize=False, add_generation_prompt=response is None
                    )
                )
        except UserError:  # of a time limit
            raise
        except Exception as error:  # templates raise whatever their authors chose
            roles = [message["role"] for message in conversation]
            raise ConfigError(
                f"The tokenizer's chat template does not support a conversation with the roles {roles} ({error}).",
                'Use another template: data.template="{prompt}\\n"',
            ) from error

    def _encode(self, text: str, special: bool = False) -> tuple[list[int], list[int]]:
        """Return the token ids of a text, and for each token the index in the text where it ends."""
        if self.tokenizer.is_fast:
            with encoding():
                encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
            return list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]
        input_ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        return input_ids, [len(self.tokenizer.decode(input_ids[: i + 1])) for i in range(len(input_ids))]

    def _one_bos(self, prompt: list[int]) -> list[int]:
        """Start with exactly one BOS if the tokenizer or the template writes one, and with none otherwise."""
        count = 0
        while self._bos is not None and count < len(prompt) and prompt[count] == self._bos:
            count += 1
        bos = [self._bos] if self._bos is not None and (count > 0 or self._adds_bos) else []
        return bos + prompt[count:]

    def _one_eos(self, response: list[int]) -> list[int]:
        """End with exactly one EOS. White space that a template writes after it, such as a line feed, is removed."""
        eos = self.tokenizer.eos_token_id
        last = max((i for i, token in enumerate(response) if token == eos), default=None)
        if last is not None and not str(self.tokenizer.decode(response[last + 1 :])).strip():
            return response[: last + 1]
        return [*response, eos]


def replace_response(
    row: EncodedResponse, other: EncodedResponse, max_length: int, bos_token_id: int | None
) -> EncodedResponse:
    """Combine the prompt of one row with the response of another; the prompt is truncated to fit ``max_length``."""
    response = other.input_ids[other.start :]
    prompt = _keep_end(row.input_ids[: row.start], max_length - len(response), bos_token_id)
    return EncodedResponse(prompt + response, len(prompt))


def _keep_end(prompt: list[int], limit: int, bos: int | None) -> list[int]:
    """Truncate a prompt to its last tokens, which matter most to the response, and keep its BOS."""
    if len(prompt) <= limit:
        return prompt
    opening = prompt[:1] if prompt[:1] == [bos] else []
    return opening + prompt[len(prompt) - (limit - len(opening)) :]


def _common_prefix_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _slow_template() -> ConfigError:
    return ConfigError(
        f"The tokenizer's chat template takes more than {RENDER_SECONDS} seconds for one conversation.",
        'Use another template: data.template="{prompt}\n"',
    )
