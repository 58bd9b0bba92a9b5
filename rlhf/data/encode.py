"""Encode records as token ids: prompt and response as one text, with one BOS and a final EOS that is learned."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf.data.encoded import EncodedConversation, EncodedResponse, EncodedText, keep_end
from rlhf.data.openings import Openings
from rlhf.data.records import Message
from rlhf.errors import ConfigError, UserError
from rlhf.process.time_limit import time_limit
from rlhf.tokenizer.probe import RENDER_SECONDS, encoding
from rlhf.tokenizer.templates import is_plain_template

Batch = TypeVar("Batch")
_Conversation: TypeAlias = tuple[Sequence[Message], str | None]  # messages of a prompt, and a response


@dataclass(frozen=True)
class _Prepared:
    """Conversations that were rendered and encoded at once.

    Args:
        conversations: The conversations. While they are referenced, no other object has the ids of their messages.
        texts: Texts of the conversations and of their prompts, by id of the messages and response.
        encoded: The same with token ids, of the conversations only.
    """

    conversations: Sequence[_Conversation]
    texts: dict[tuple[int, str | None], str]
    encoded: dict[tuple[int, str | None], EncodedText] = field(default_factory=dict)


class Encoder:
    """Renders prompts and responses with the tokenizer's chat template and encodes them.

    Args:
        tokenizer: A tokenizer with a chat template.
        max_length: Maximum length of prompt and response together, in tokens. Longer sequences lose the beginning of
            the prompt. A response that alone is longer than ``max_length - 1`` is truncated as well, without an EOS.

    Attributes:
        counts: Number of ``responses``, ``truncated_prompts`` and ``truncated_responses`` so far.
        openings: What the template does to responses.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.counts: Counter[str] = Counter()
        self.openings = Openings()
        self._prepared = _Prepared([], {})
        self._bos: int | None = tokenizer.bos_token_id
        self._adds_bos = self._bos is not None and self._encode("x", special=True).input_ids[:1] == [self._bos]

    def prepare(self, conversations: Sequence[_Conversation]) -> None:
        """Encode many conversations at once, which is faster, for the following calls of this object.

        Results do not depend on whether a conversation has been prepared. Those of the previous call are forgotten.

        Args:
            conversations: Messages of a prompt with a response, or with None for the prompt alone.
        """
        self._prepared = self._rendered_together(conversations)
        self._encode_together(self._prepared)

    def prepared(
        self, batches: Iterable[Batch], conversations: Callable[[Batch], Sequence[_Conversation]]
    ) -> Iterator[Batch]:
        """Yield batches of records when their conversations have been prepared.

        Another thread encodes the next batch at the same time, because the ``tokenizers`` library does not need
        Python's lock.

        Args:
            batches: The batches, of any type.
            conversations: Returns the conversations of a batch, as ``prepare`` takes them.
        """
        with ThreadPoolExecutor(1) as executor:
            previous: tuple[Batch, _Prepared, Future[None]] | None = None
            for batch in batches:
                prepared = self._rendered_together(conversations(batch))
                future = executor.submit(self._encode_together, prepared)
                if previous is not None:
                    yield self._use(*previous)
                previous = batch, prepared, future
            if previous is not None:
                yield self._use(*previous)

    def _use(self, batch: Batch, prepared: _Prepared, future: Future[None]) -> Batch:
        future.result()
        self._prepared = prepared
        return batch

    def encode_prompt(self, messages: Sequence[Message], *, reserve: int = 0) -> list[int]:
        """Encode a prompt up to the point where the response begins.

        Args:
            messages: The conversation.
            reserve: Number of tokens of ``max_length`` to keep free for the response.
        """
        input_ids = self._one_bos(self._rendered(messages, None).input_ids)
        limit = self.max_length - reserve
        self.counts["truncated_prompts"] += len(input_ids) > limit
        return keep_end(input_ids, limit, self._bos)

    def encode_response(self, messages: Sequence[Message], response: str) -> EncodedResponse:
        """Encode a prompt and a response as one text."""
        return self.encode_responses(messages, [response])[0]

    def encode_responses(self, messages: Sequence[Message], responses: Sequence[str]) -> list[EncodedResponse]:
        """Encode a prompt with each of several responses.

        If the prompt must be truncated, the longest response decides and all responses get the same prompt: otherwise,
        the prompt would reveal which of them is the longer one.
        """
        opening = self._render(messages, response=None)
        pairs = [self._split(opening, self._rendered(messages, response), response) for response in responses]
        return self._truncate(pairs)

    def encode_conversation(self, messages: Sequence[Message], response: str) -> EncodedConversation:
        """Encode a prompt and a response as one text, with the positions of all assistant messages.

        Raises:
            ConfigError: The chat template does not write an earlier assistant message as the model would write it.
        """
        complete = self._rendered(messages, response)
        pair = self._split(self._render(messages, response=None), complete, response)
        (encoded,) = self._truncate([pair])
        shift = len(self._one_bos(complete.input_ids)) - len(complete.input_ids) + encoded.start - len(pair[0])
        earlier: list[int] = []
        for begin, end in self._earlier_messages(messages, complete.text):
            # Nothing precedes the token at index 0, and truncation keeps a BOS there.
            first, last = max(complete.first_token(begin) + shift, 1), complete.end_token(end) + shift
            earlier += [first, last] if first < last else []
        return EncodedConversation(encoded.input_ids, encoded.start, earlier)

    def _earlier_messages(self, messages: Sequence[Message], text: str) -> Iterator[tuple[int, int]]:
        """Yield where the assistant messages of a prompt begin and end in the text of the conversation.

        A message ends with its end-of-turn token, without white space that follows.
        """
        turns = [i for i, message in enumerate(messages) if i > 0 and message["role"] == "assistant"]
        if not turns:
            return
        openings = self._render_all([(messages[:i], None) for i in turns])
        closings = self._render_all([(messages[:i], messages[i]["content"]) for i in turns])
        for i, opening, closing in zip(turns, openings, closings, strict=True):
            end = closing.rstrip()
            if not text.startswith(end):  # The templates of plain texts write EOS after the last message only.
                end = end.removesuffix(str(self.tokenizer.eos_token))
            if not (text.startswith(opening) and text.startswith(end)):
                raise _changed_message(i)
            if len(opening) < len(end):
                yield len(opening), len(end)

    def _truncate(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[EncodedResponse]:
        """Truncate prompts with their responses as ``encode_responses`` describes, and count them."""
        self.counts["responses"] += len(pairs)
        longest = max(len(response) for _, response in pairs)
        if longest > self.max_length - 1:
            self.counts["truncated_responses"] += sum(len(response) > self.max_length - 1 for _, response in pairs)
            longest = self.max_length - 1
        limit = self.max_length - longest
        self.counts["truncated_prompts"] += any(len(prompt) > limit for prompt, _ in pairs)
        encoded = []
        for prompt, response in pairs:
            prompt = keep_end(prompt, limit, self._bos)
            encoded.append(EncodedResponse(prompt + response[: self.max_length - 1], len(prompt)))
        return encoded

    def _split(self, opening: str, complete: EncodedText, response: str) -> tuple[list[int], list[int]]:
        """Split the token ids of a complete text where the response begins."""
        boundary = self.openings.boundary(opening, complete.text, response)
        start = complete.first_token(boundary)  # A token that spans the boundary counts as part of the response.
        return self._one_bos(complete.input_ids[:start]), self._one_eos(complete.input_ids[start:])

    def _rendered(self, messages: Sequence[Message], response: str | None) -> EncodedText:
        """Return the text of a conversation with its token ids."""
        encoded = self._prepared.encoded.get((id(messages), response))
        return self._encode(self._render(messages, response)) if encoded is None else encoded

    def _rendered_together(self, conversations: Sequence[_Conversation]) -> _Prepared:
        """Render conversations, and the prompts that they start with."""
        prepared = _Prepared(conversations, {})
        if self.tokenizer.is_fast:
            prompts: dict[int, _Conversation] = {id(messages): (messages, None) for messages, _ in conversations}
            complete = [pair for pair in conversations if pair[1] is not None]
            for alike in filter(None, ([*prompts.values()], complete)):
                for (messages, response), text in zip(alike, self._render_all(alike), strict=True):
                    prepared.texts[id(messages), response] = text
        return prepared

    def _encode_together(self, prepared: _Prepared) -> None:
        if prepared.texts:
            keys = [(id(messages), response) for messages, response in prepared.conversations]
            texts = self._encode_all([prepared.texts[key] for key in keys])
            prepared.encoded.update(zip(keys, texts, strict=True))

    def _render_all(self, conversations: Sequence[_Conversation]) -> list[str]:
        """Render conversations, all with a response or all without one."""
        try:
            return self._apply_template([_complete(*pair) for pair in conversations], conversations[0][1] is None)
        except Exception:  # The conversation that causes it raises it again.
            return [self._render(*pair) for pair in conversations]

    def _render(self, messages: Sequence[Message], response: str | None) -> str:
        if (id(messages), response) in self._prepared.texts:
            return self._prepared.texts[id(messages), response]
        conversation = _complete(messages, response)
        try:
            return self._apply_template([conversation], response is None)[0]
        except UserError:  # of a time limit
            raise
        except Exception as error:  # templates raise whatever their authors chose
            roles = [message["role"] for message in conversation]
            raise ConfigError(
                f"The tokenizer's chat template does not support a conversation with the roles {roles} ({error}).",
                "Rename the other roles in the data, or remove their messages."
                if is_plain_template(self.tokenizer)
                else 'Use another template: data.template="{prompt}\\n"',
            ) from error

    def _apply_template(self, conversations: list[list[Message]], is_prompt: bool) -> list[str]:
        with time_limit(RENDER_SECONDS, _slow_template()):
            rendered: Any = self.tokenizer.apply_chat_template(
                conversations, tokenize=False, add_generation_prompt=is_prompt
            )
        return list(rendered)

    def _encode(self, text: str, special: bool = False) -> EncodedText:
        if self.tokenizer.is_fast:
            return self._encode_all([text], special)[0]
        input_ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        return EncodedText(
            text, input_ids, ends=[len(self.tokenizer.decode(input_ids[: i + 1])) for i in range(len(input_ids))]
        )

    def _encode_all(self, texts: Sequence[str], special: bool = False) -> list[EncodedText]:
        """Encode texts at once with a tokenizer of the ``tokenizers`` library, which uses all processors for it."""
        with encoding():
            encoded = self.tokenizer(
                list(texts), add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
            )
        columns = zip(texts, encoded["input_ids"], encoded.encodings or (), strict=True)
        return [EncodedText(*column) for column in columns]

    def _one_bos(self, prompt: list[int]) -> list[int]:
        """Start with exactly one BOS if the tokenizer or the template writes one, and with none otherwise."""
        count = 0
        while self._bos is not None and count < len(prompt) and prompt[count] == self._bos:
            count += 1
        bos = [self._bos] if self._bos is not None and (count > 0 or self._adds_bos) else []
        return bos + prompt[count:]

    def _one_eos(self, response: list[int]) -> list[int]:
        """End with exactly one EOS. White space that a template writes after it, and an EOS before it, are removed."""
        eos = self.tokenizer.eos_token_id
        if eos in response:
            end = len(response) - response[::-1].index(eos)
            if end == len(response) or not str(self.tokenizer.decode(response[end:])).strip():
                while end > 1 and response[end - 2] == eos:
                    end -= 1
                return response[:end]
        return [*response, eos]


def _complete(messages: Sequence[Message], response: str | None) -> list[Message]:
    return list(messages) if response is None else [*messages, {"role": "assistant", "content": response}]


def _slow_template() -> ConfigError:
    return ConfigError(
        f"The tokenizer's chat template takes more than {RENDER_SECONDS} seconds for one conversation.",
        'Use another template: data.template="{prompt}\n"',
    )


def _changed_message(index: int) -> ConfigError:
    return ConfigError(
        f"data.loss_on=assistant: the tokenizer's chat template changes the text of message {index + 1}, by the "
        "assistant, when other messages follow, so the model would not learn what it has to write. For example, some "
        "templates remove the reasoning of earlier messages.",
        "Set data.loss_on=response, which covers the last assistant message only.",
    )
