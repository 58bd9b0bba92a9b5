"""Parse rows of data into records. The fields that a row has determine how it is parsed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rlhf.data.columns import check_columns, context_columns
from rlhf.data.messages import (
    check_characters,
    conversation,
    is_transcript_prompt,
    parse_history,
    parse_messages,
    parse_transcript,
)
from rlhf.data.records import (
    FIELDS,
    Demonstration,
    Message,
    Preference,
    Prompt,
    Rating,
    Record,
    RecordError,
    Row,
    UnpairedPreference,
)
from rlhf.data.unsupported import has_tools


@dataclass(frozen=True)
class RecordParser:
    """Parses rows of data into records.

    Args:
        columns: Maps a field to the name of its column, such as ``{"rejected": "loser"}``. A field that is missing or
            mapped to ``None`` has a column of the same name, and ``system`` and ``history`` those of ``CONTEXT``.
        all_learned: Whether all messages by the assistant carry loss, not only the last one of a row.

    Raises:
        ConfigError: ``columns`` has a key that is not a field, or maps fields of different content, such as ``prompt``
            and ``target``, to the same column.
    """

    columns: Mapping[str, str | None] = field(default_factory=dict)
    all_learned: bool = False

    def __post_init__(self) -> None:
        check_columns(self.columns)

    def column(self, name: str) -> str:
        """Return the column of a field."""
        renamed = self.columns.get(name)
        return name if renamed is None else renamed

    def has(self, row: Row, name: str) -> bool:
        """Return whether a row has a value for a field. Columns that a row does not use contain None."""
        return row.get(self.column(name)) is not None

    def _first_name(self, row: Row, *names: str) -> str:
        """Return the first of several fields that has a value; otherwise one that is null, renamed, or the first."""
        conditions = (lambda name: self.has(row, name), lambda name: self.column(name) in row, self.columns.get)
        return next((name for condition in conditions for name in names if condition(name)), names[0])

    @cached_property
    def _context_columns(self) -> dict[str, Sequence[str]]:
        return context_columns(self.columns)

    def system_column(self, row: Row) -> str | None:
        """Return the column of the system prompt of a row; None if it has none."""
        for column in self._context_columns["system"]:
            text = row.get(column)
            if isinstance(text, str) and text.strip():
                return column
        return None

    def without_alpaca_fields(self, row: Row) -> Row:
        """Return a row of the form of Alpaca as a prompt with a completion; other rows as they are.

        Its fields are ``instruction``, ``output`` and possibly ``input`` (https://github.com/tatsu-lab/stanford_alpaca).
        """
        texts = [row.get(name) for name in ("instruction", "output")]
        is_alpaca = all(isinstance(text, str) for text in texts)
        if not is_alpaca or any(self.columns.get(name) or row.get(name) is not None for name in FIELDS):
            return row
        prompt = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text and isinstance(text, str))
        return {**row, "prompt": prompt, "completion": row["output"]}

    def parse(self, row: Row, record_type: type[Record]) -> Any:
        """Parse a row as a record of the given type.

        Raises:
            RecordError: The row is not a valid record of this type.
        """
        row = self.without_alpaca_fields(row)
        record = {
            Demonstration: self._demonstration,
            Preference: self._preference,
            Rating: self._rating,
            UnpairedPreference: self._unpaired,
            Prompt: self._any_prompt,
        }[record_type](row)
        if has_tools(row) and "tools" not in self.columns.values():
            raise RecordError("the field 'tools' describes tools, which are not supported")
        return record

    def _demonstration(self, row: Row) -> Demonstration:
        if self.has(row, "messages"):
            messages = self._messages(row, "messages")
            response = self._final_response(messages, "messages")
            prompt = self._conversation(row, messages[:-1])
        else:
            response = self._response(row, self._demonstrated(row), "demonstration")
            prompt = self._prompt(row, "demonstration")
        if not response.strip():
            raise RecordError("the response is empty")
        return Demonstration(prompt, response)

    def _demonstrated(self, row: Row) -> str:
        """Return the field of the response of a demonstration; if it is missing, that of the form of the row."""
        if self.has(row, "completion"):
            return "completion"
        form = self._first_name(row, "prompt", "document", "messages")
        if form == "messages":
            return form
        return self._first_name(row, *(("target", "completion") if form == "document" else ("completion", "target")))

    def _preference(self, row: Row) -> Preference:
        margin = self._number(row, "margin", "preference") if self.has(row, "margin") else 0.0
        if self.has(row, "prompt") or self.has(row, "document"):
            prompt = self._prompt(row, "preference")
            chosen, rejected = (self._response(row, name, "preference") for name in ("chosen", "rejected"))
        else:
            prompt, chosen, rejected = self._transcripts(row)
        if chosen == rejected:
            raise RecordError("'chosen' and 'rejected' are identical")
        return Preference(prompt, chosen, rejected, margin)

    def _rating(self, row: Row) -> Rating:
        response, reward = self._response(row, "response", "rating"), self._number(row, "reward", "rating")
        return Rating(self._prompt(row, "rating"), response, reward)

    def _unpaired(self, row: Row) -> UnpairedPreference:
        kind = "unpaired preference"
        name = "response" if self.has(row, "response") else self._first_name(row, "completion", "response")
        response = self._response(row, name, kind)
        label = self._get(row, "label", kind)
        if label not in (True, False):  # 1 and 0 are equal to these and therefore valid
            raise RecordError(f"the field '{self.column('label')}' must be true or false, got {label!r}")
        return UnpairedPreference(self._prompt(row, kind), response, bool(label))

    def _any_prompt(self, row: Row) -> Prompt:
        """Parse the prompt of a row of any kind, with the demonstrated or chosen response as its target."""
        target = None
        if self.has(row, "messages"):
            messages = self._messages(row, "messages")
            if messages[-1]["role"] != "assistant":
                return self._conversation(row, messages)
            prompt, target = self._conversation(row, messages[:-1]), messages[-1]["content"]
        elif self.has(row, "prompt") or self.has(row, "document"):
            prompt = self._prompt(row, "prompt")
            for name in ("target", "completion", "chosen"):
                if self.has(row, name):
                    target = self._response(row, name, "prompt")
                    break
        elif self.has(row, "chosen") and self.has(row, "rejected"):
            prompt, target, _ = self._transcripts(row)
        else:
            raise self._missing(row, self._first_name(row, "prompt", "document", "messages"), "prompt")
        return Prompt(prompt.messages, prompt.raw_text, target)

    def _prompt(self, row: Row, kind: str) -> Prompt:
        """Parse ``prompt``, or ``document`` if there is no ``prompt``: text or a list of messages."""
        name = self._first_name(row, "prompt", "document")
        column, value = self.column(name), self._get(row, name, kind)
        if not isinstance(value, str):
            return self._conversation(row, self._messages(row, name))
        if not value.strip():
            raise RecordError(f"the field '{column}' is empty")
        check_characters(column, value)
        is_transcript = is_transcript_prompt(value)
        turns = parse_transcript(value, column)[:-1] if is_transcript else [{"role": "user", "content": value}]
        history = [
            turn for column in self._context_columns["history"] for turn in parse_history(row.get(column), column)
        ]
        return self._conversation(row, [*history, *turns])

    def _conversation(self, row: Row, messages: Sequence[Message]) -> Prompt:
        """Return the conversation up to the next response, with the system prompt of the row."""
        return conversation(self._with_system(row, messages))

    def _with_system(self, row: Row, messages: Sequence[Message]) -> list[Message]:
        """Return messages that begin with the system prompt of the row, unless they begin with another one."""
        column = self.system_column(row)
        if column is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        check_characters(column, row[column])
        return [{"role": "system", "content": row[column]}, *messages]

    def _response(self, row: Row, name: str, kind: str) -> str:
        """Parse a response: text, a number, a list of one message, or a list that repeats the prompt before it."""
        value = self._get(row, name, kind)
        if _is_text_or_number(value):
            response = str(value)  # JSON and Parquet files contain numbers.
            check_characters(self.column(name), response)
            return response.strip() if self._continues_transcript(row) else response
        messages = self._messages(row, name)
        if len(messages) > 1:
            self._check_prompt(row, name, kind, messages[:-1])
        return self._final_response(messages, name)

    def _continues_transcript(self, row: Row) -> bool:
        """Return whether the prompt of a row is a transcript in the format of HH."""
        prompt = row.get(self.column(self._first_name(row, "prompt", "document")))
        return isinstance(prompt, str) and is_transcript_prompt(prompt)

    def _check_prompt(self, row: Row, name: str, kind: str, before: Sequence[Message]) -> None:
        """Raise an error if the messages before a response are not those of the prompt."""
        prompt = self._prompt(row, kind).messages
        if list(prompt) in (list(before), self._with_system(row, before)):
            return
        column, shared = self.column(name), self.column("prompt" if self.has(row, "prompt") else "document")
        shorter = min(len(before), len(prompt))
        different = next((i for i in range(shorter) if before[i] != prompt[i]), shorter)
        raise RecordError(
            f"the field '{column}' has {len(before) + 1} messages, but those before the last one are not the "
            f"{len(prompt)} of the field '{shared}': message {different + 1} differs",
            fix=f"To use the complete conversations, remove the field '{shared}'."
            if name in ("chosen", "rejected")
            else f"Write only the response to the field '{column}'.",
        )

    def _transcripts(self, row: Row) -> tuple[Prompt, str, str]:
        """Parse two complete conversations that differ in the final response only."""
        conversations: list[list[Message]] = []
        for name in ("chosen", "rejected"):
            value = self._get(row, name, "preference")
            if isinstance(value, str) and "\n\nAssistant:" not in value:
                raise self._missing(row, "prompt", "preference")
            is_text = isinstance(value, str)
            conversations.append(parse_transcript(value, self.column(name)) if is_text else self._messages(row, name))
        chosen, rejected = conversations
        if chosen[:-1] != rejected[:-1]:
            raise RecordError(
                "'chosen' and 'rejected' diverge before the final response, so they do not share a prompt"
            )
        return (
            self._conversation(row, chosen[:-1]),
            self._final_response(chosen, "chosen"),
            self._final_response(rejected, "rejected"),
        )

    def _messages(self, row: Row, name: str) -> list[Message]:
        column = self.column(name)
        return parse_messages(row[column], column, all_learned=self.all_learned)

    def _final_response(self, messages: Sequence[Message], name: str) -> str:
        if (role := messages[-1]["role"]) != "assistant":
            raise RecordError(
                f"the field '{self.column(name)}' must end with a message by 'assistant', but the last one is by "
                f"{role!r:.40}"
            )
        return messages[-1]["content"]

    def _number(self, row: Row, name: str, kind: str) -> float:
        value = self._get(row, name, kind)
        try:
            number = float("nan") if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
        except OverflowError:  # An integer of more than 308 digits.
            number = float("inf")
        if not math.isfinite(number):
            raise RecordError(f"the field '{self.column(name)}' must be a finite number, got {value!r:.40}")
        return number

    def _get(self, row: Row, name: str, kind: str) -> Any:
        value = row.get(self.column(name))
        if value is None:
            raise self._missing(row, name, kind)
        return value

    def _missing(self, row: Row, name: str, kind: str) -> RecordError:
        column = self.column(name)
        fields = ", ".join(key for key, value in row.items() if value is not None) or "none"
        if column in row:
            reason = f"the field '{column}' of the {kind} record is null (fields: {fields})"
            return RecordError(reason, name, is_null=True)
        return RecordError(f"the {kind} record has no field '{column}' (fields: {fields})", name)


def _is_text_or_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)
