"""What a row of data means. A row is recognised by the names of its fields; a row that fits no form says why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rlhf.errors import UserError

Message: TypeAlias = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": "..."}


class RecordError(ValueError):
    """A row that cannot be used. ``field`` names the one that is missing, for the override to type."""

    def __init__(self, reason: str, missing: str | None = None) -> None:
        super().__init__(reason)
        self.missing = missing


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the next answer.

    messages: ends with what the user said.
    raw_text: the prompt as it stands in the data, for scoring functions.
    target: the data's own answer, where it has one.
    """

    messages: Sequence[Message]
    raw_text: str
    target: str | None = None


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer to learn."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class Preference:
    """A prompt and two answers, the better one named; ``margin`` says by how much, in reward units."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0


@dataclass(frozen=True)
class Rating:
    """A prompt, an answer and what it is worth, in reward units."""

    prompt: Prompt
    response: str
    reward: float


@dataclass(frozen=True)
class UnpairedPreference:
    """A prompt, an answer and whether it is one to give."""

    prompt: Prompt
    response: str
    desirable: bool


EXPECTED = {
    Demonstration: '{"document": "...", "target": "..."}, {"prompt": "...", "completion": "..."}, {"messages": [...]}',
    Preference: '{"prompt": "...", "chosen": "...", "rejected": "..."}',
    Rating: '{"prompt": "...", "response": "...", "reward": 0.5}',
    UnpairedPreference: '{"prompt": "...", "completion": "...", "label": true}, or preference pairs',
    Prompt: '{"prompt": "..."} or {"document": "..."}',
}

# Every field that a record may have; ``data.columns`` in conf/data/ declares the same names.
FIELDS = (
    "prompt",
    "document",
    "target",
    "completion",
    "messages",
    "chosen",
    "rejected",
    "margin",
    "response",
    "reward",
    "label",
)


@dataclass(frozen=True)
class RecordParser:
    """Turns rows into records.

    Args:
        columns: The data's own name for a field, such as ``{"rejected": "loser"}``. A field that is missing or
            mapped to ``None`` keeps its own name.

    Raises:
        UserError: If ``columns`` has a key that is not one of ``FIELDS``.
    """

    columns: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.columns if name not in FIELDS]:
            name, column = unknown[0], self.columns[unknown[0]]
            swapped = isinstance(column, str) and column in FIELDS
            raise UserError(
                f"data.columns.{name}={column}: '{name}' is not a field of a record; the key must be one of "
                f"{', '.join(FIELDS)}, and the value is the column's name in the data",
                f"data.columns.{column}={name}" if swapped else f"data.columns.<field>={name}",
            )

    def column(self, name: str) -> str:
        """Return the name that a field has in the data."""
        renamed = self.columns.get(name)
        return name if renamed is None else renamed

    def read(self, row: Mapping[str, Any], form: type) -> Any:
        """One row as a record of the given form. Raises RecordError for a row that cannot be used."""
        return {
            Demonstration: self.demonstration,
            Preference: self.preference,
            Rating: self.rating,
            UnpairedPreference: self.unpaired,
            Prompt: self.prompt,
        }[form](row)

    def has(self, row: Mapping[str, Any], name: str) -> bool:
        return row.get(self.column(name)) is not None

    def demonstration(self, row: Mapping[str, Any]) -> Demonstration:
        if self.has(row, "messages"):
            messages = self._messages(row, "messages")
            response = self._closing_answer(messages, "messages")
            prompt = _conversation(messages[:-1])
        else:
            response = self._answer(row, "completion" if self.has(row, "completion") else "target", "demonstration")
            prompt = self._prompt_of(row, "demonstration")
        if not response.strip():
            raise RecordError("the answer is empty: there is nothing to learn")
        return Demonstration(prompt, response)

    def preference(self, row: Mapping[str, Any]) -> Preference:
        margin = self._number(row, "margin", "preference") if self.has(row, "margin") else 0.0
        if self.has(row, "prompt") or self.has(row, "document"):
            prompt = self._prompt_of(row, "preference")
            chosen, rejected = (self._answer(row, name, "preference") for name in ("chosen", "rejected"))
        else:
            prompt, chosen, rejected = self._transcripts(row)
        if chosen == rejected:
            raise RecordError("'chosen' and 'rejected' are the same text: there is nothing to prefer")
        return Preference(prompt, chosen, rejected, margin)

    def rating(self, row: Mapping[str, Any]) -> Rating:
        response, reward = self._answer(row, "response", "rating"), self._number(row, "reward", "rating")
        return Rating(self._prompt_of(row, "rating"), response, reward)

    def unpaired(self, row: Mapping[str, Any]) -> UnpairedPreference:
        response = self._answer(row, "response" if self.has(row, "response") else "completion", "unpaired")
        label = self._get(row, "label", "unpaired")
        if label not in (True, False):  # 1 and 0 among them
            raise RecordError(f"field '{self.column('label')}' is {label!r}, neither true nor false")
        return UnpairedPreference(self._prompt_of(row, "unpaired"), response, bool(label))

    def prompt(self, row: Mapping[str, Any]) -> Prompt:
        """The prompt of a row of any form, with the answer to learn as its target."""
        target = None
        if self.has(row, "messages"):
            messages = self._messages(row, "messages")
            if messages[-1]["role"] != "assistant":
                return _conversation(messages)
            prompt, target = _conversation(messages[:-1]), messages[-1]["content"]
        elif self.has(row, "prompt") or self.has(row, "document"):
            prompt = self._prompt_of(row, "prompt")
            for name in ("target", "completion", "chosen"):
                if self.has(row, name):
                    target = self._answer(row, name, "prompt")
                    break
        elif self.has(row, "chosen") and self.has(row, "rejected"):
            prompt, target, _ = self._transcripts(row)
        else:
            raise self._missing(row, "prompt", "prompt")
        return Prompt(prompt.messages, prompt.raw_text, target)

    def _prompt_of(self, row: Mapping[str, Any], kind: str) -> Prompt:
        name = "document" if self.has(row, "document") and not self.has(row, "prompt") else "prompt"
        value = self._get(row, name, kind)
        if isinstance(value, str):
            if not value.strip():
                raise RecordError(f"field '{self.column(name)}' is empty")
            return Prompt([{"role": "user", "content": value}], value)
        return _conversation(self._messages(row, name))

    def _answer(self, row: Mapping[str, Any], name: str, kind: str) -> str:
        value = self._get(row, name, kind)
        if isinstance(value, str | int | float):
            return str(value)  # a column of numbers in a CSV file
        return self._closing_answer(self._messages(row, name), name)

    def _transcripts(self, row: Mapping[str, Any]) -> tuple[Prompt, str, str]:
        """Two whole conversations that part at the last answer."""
        sides: list[list[Message]] = []
        for name in ("chosen", "rejected"):
            value = self._get(row, name, "preference")
            if isinstance(value, str) and "\n\nAssistant:" not in value:
                raise self._missing(row, "prompt", "preference")
            sides.append(_parse_transcript(value) if isinstance(value, str) else self._messages(row, name))
        chosen, rejected = sides
        if chosen[:-1] != rejected[:-1]:
            raise RecordError("'chosen' and 'rejected' part before their last answer: they do not share a prompt")
        return (
            _conversation(chosen[:-1]),
            self._closing_answer(chosen, "chosen"),
            self._closing_answer(rejected, "rejected"),
        )

    def _messages(self, row: Mapping[str, Any], name: str) -> list[Message]:
        value = row[self.column(name)]
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise RecordError(f"field '{self.column(name)}' is neither text nor a list of messages")
        for message in value:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(k), str) for k in ("role", "content")
            ):
                raise RecordError(f"field '{self.column(name)}': a message needs 'role' and 'content', both text")
        return [{"role": message["role"], "content": message["content"]} for message in value]

    def _closing_answer(self, messages: Sequence[Message], name: str) -> str:
        if messages[-1]["role"] != "assistant":
            raise RecordError(f"field '{self.column(name)}' does not end with an answer by 'assistant'")
        return messages[-1]["content"]

    def _number(self, row: Mapping[str, Any], name: str, kind: str) -> float:
        value = self._get(row, name, kind)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RecordError(f"field '{self.column(name)}' is {value!r}, not a finite number")
        return float(value)

    def _get(self, row: Mapping[str, Any], name: str, kind: str) -> Any:
        value = row.get(self.column(name))
        if value is None:
            raise self._missing(row, name, kind)
        return value

    def _missing(self, row: Mapping[str, Any], name: str, kind: str) -> RecordError:
        there = ", ".join(repr(key) for key, value in row.items() if value is not None)
        wanted = self.column(name)
        return RecordError(f"{kind} record has no '{wanted}'; its fields are {there or 'none'}", missing=name)


def _conversation(messages: Sequence[Message]) -> Prompt:
    if not messages or messages[-1]["role"] == "assistant":
        raise RecordError("the conversation before the answer does not end with the user")
    if len(messages) == 1:
        return Prompt(messages, messages[0]["content"])
    return Prompt(messages, "\n\n".join(f"{message['role']}: {message['content']}" for message in messages))


def _parse_transcript(text: str) -> list[Message]:
    """The ``\\n\\nHuman: ... \\n\\nAssistant: ...`` form of HH (Bai et al. 2022, arXiv:2204.05862)."""
    messages = []
    for turn in text.replace("\n\nHuman:", "\x00user\x01").replace("\n\nAssistant:", "\x00assistant\x01").split("\x00"):
        role, mark, content = turn.partition("\x01")
        if mark:
            messages.append({"role": role, "content": content.strip()})
    return messages
