"""Guess what fixes a row that is not a valid record, for the error message."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlhf.data.forms import FORMS, form_of
from rlhf.data.parser import RecordParser
from rlhf.data.records import CONTEXT, FIELDS, Demonstration, Prompt, Record, RecordError, Row
from rlhf.overrides import to_override

COMMON_FIELDS = ("prompt", "document", "target", "chosen", "rejected")
UNKNOWN = "<name>"
# Names of columns that data often have for a field.
RESPONSES = ("target", "completion", "answer", "response", "output", "summary", "solution", "reply", "a")
CONVERSATIONS = ("conversations", "conversation")
USUAL_NAMES = {
    "prompt": ("document", "question", "instruction", "query", "input", "problem", "article", "q", *CONVERSATIONS),
    "messages": CONVERSATIONS,
    **dict.fromkeys(("target", "completion", "response"), RESPONSES),
    "chosen": ("preferred", "winner", "better", "good", "accepted"),
    "rejected": ("dispreferred", "loser", "worse", "bad"),
    "reward": ("score", "rating", "stars"),
    "label": ("desirable", "liked", "is_good"),
}
# Values with which a row is parsed again if no column is likely, to find the next missing field.
NUMBERS: dict[str, Any] = {"label": True, "reward": 0.0}
PLAIN_TEXT = "Plain text is not supported: each row must have a prompt and a response."
PLAIN_TEXT_OF_SFT = (
    "Plain text is not supported. For stage=sft, write the first word of each text to 'prompt' and the rest to "
    "'completion', and add 'data.template=\"{prompt}\"' data.loss_on=all"
)
TRANSCRIPT = "\n\nHuman: ...\n\nAssistant: ..."  # A valid value for every other field.


def hints(parser: RecordParser, row: Row, record_type: type[Record], error: RecordError, *, mixed: bool) -> list[str]:
    """Return what may fix a row of which a field is missing, as lines of an error message.

    Args:
        parser: The parser.
        row: The row.
        record_type: The type of the record that the row should contain.
        error: What is wrong with the row.
        mixed: Whether other rows of the file are valid.
    """
    form = form_of(parser, row)
    name, readers = FORMS[form]
    named = f"The row has the form of {name}, which are read by {readers}."
    is_valid = form is not record_type and parses(parser, row, form)
    if is_valid and form is not Prompt:
        return [f"{named} Use one file per form." if mixed else named]
    columns = {} if error.is_null else likely_columns(parser, row, record_type)
    if set(columns.values()) - {UNKNOWN}:
        return [_other_names(columns)]
    found = [named] if is_valid and not mixed else []
    free = _free_columns(parser, row)
    if "text" in free and record_type is not Prompt:
        found.append(PLAIN_TEXT_OF_SFT if record_type is Demonstration else PLAIN_TEXT)
    return [*found, *([_other_names(columns)] if 0 < len(columns) <= len(free) else [])]


def parses(parser: RecordParser, row: Row, record_type: type[Record]) -> bool:
    """Return whether a row is a valid record of a type."""
    try:
        parser.parse(row, record_type)
    except RecordError:
        return False
    return True


def _other_names(columns: Mapping[str, str]) -> str:
    """Return the overrides that map fields to columns, quoted for Hydra and the shell."""
    overrides = []
    for name, column in columns.items():
        key = f"data.columns.{name}"
        overrides.append(f"{key}={UNKNOWN}" if column == UNKNOWN else shlex.quote(to_override(key, column)))
    named = "If the field has another name" if len(overrides) == 1 else "If the fields have other names"
    return f"{named}: {' '.join(overrides)}"


def likely_columns(parser: RecordParser, row: Row, record_type: type[Record]) -> dict[str, str]:
    """Guess which columns contain the missing fields of a row; ``<name>`` if several columns are as likely.

    A column is likely if it has a usual name for the field, or if no other column is left. The row is parsed again with
    each guess, because this may show that further fields are missing.

    Args:
        parser: The parser, with the columns that the user has specified.
        row: The row.
        record_type: The type of the record that the row should contain.
    """
    found: dict[str, str] = {}
    columns, filled = dict(parser.columns), dict(row)
    while True:
        name = _missing(replace(parser, columns=columns), filled, record_type)
        if name is None or name in found:
            break
        free = _free_columns(replace(parser, columns=columns), row)
        if record_type in (Demonstration, Prompt) and any(_is_usual(column, "messages") for column in free):
            name = "messages"
        column = _likely_column(name, row, free)
        found[name] = columns[name] = column
        if column == UNKNOWN:
            columns[name] = placeholder = f"<{name}>"
            filled[placeholder] = NUMBERS.get(name, TRANSCRIPT)
    if UNKNOWN in found.values():  # A column that was the only one left may contain the other field as well.
        found = {name: column if _is_usual(column, name) else UNKNOWN for name, column in found.items()}
    return {name: found[name] for name in FIELDS if name in found}


def _missing(parser: RecordParser, row: Row, record_type: type[Record]) -> str | None:
    try:
        parser.parse(row, record_type)
    except RecordError as error:
        return error.missing
    return None


def _free_columns(parser: RecordParser, row: Row) -> list[str]:
    used = {*parser.columns.values(), *COMMON_FIELDS, *CONTEXT["system"]}
    return [column for column, value in row.items() if value is not None and column not in used]


def _likely_column(name: str, row: Row, free: list[str]) -> str:
    if usual := [column for column in free if _is_usual(column, name)]:
        return usual[0]
    kinds = (bool, int, float) if name in NUMBERS else (str, list)
    of_others = [column for column in free if any(_is_usual(column, other) for other in USUAL_NAMES)]
    left = [column for column in free if isinstance(row[column], kinds) and column not in of_others]
    return left[0] if len(left) == 1 else UNKNOWN


def _is_usual(column: str, name: str) -> bool:
    return column.strip().lower() in (name, *USUAL_NAMES.get(name, ()))
