"""What precedes the prompt of a row: a system prompt, and earlier turns."""

from collections.abc import Collection
from typing import Any

from rlhf.data.messages import check_characters
from rlhf.data.records import Message, RecordError, Row

SYSTEM = ("system", "system_prompt")
HISTORY = "history"


def system_message(row: Row, used: Collection[str | None]) -> list[Message]:
    """Return the system prompt of a row as a message; no message if there is none.

    Args:
        row: The row.
        used: Columns that contain something else, because ``data.columns`` maps a field to them.
    """
    for name in SYSTEM:
        text = row.get(name)
        if isinstance(text, str) and text.strip() and name not in used:
            check_characters(name, text)
            return [{"role": "system", "content": text}]
    return []


def earlier_turns(row: Row, used: Collection[str | None]) -> list[Message]:
    """Return the field ``history`` as messages: pairs of a user message and a response, as in LLaMA-Factory.

    Text in this field is content of another kind, and is ignored.

    Args:
        row: The row.
        used: Columns that contain something else, because ``data.columns`` maps a field to them.

    Raises:
        RecordError: It is a list, but not one of pairs.
    """
    value = row.get(HISTORY)
    if not value or not isinstance(value, list) or HISTORY in used:
        return []
    messages = []
    for pair in value:
        if not _is_pair(pair):
            raise RecordError(
                f"the field '{HISTORY}' must be a list of pairs of a user message and a response, got {pair!r:.40}",
                fix='Write the conversation as {"messages": [...]}, or remove the field.',
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            check_characters(HISTORY, text)
            messages.append({"role": role, "content": text})
    return messages


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
