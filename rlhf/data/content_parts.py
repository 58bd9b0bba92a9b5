"""The content of a message as a list of parts, as chat templates of multimodal models and TRL have it."""

from collections.abc import Mapping
from typing import Any

from rlhf.data.records import RecordError


def joined_text(parts: list[Any], column: str, number: int) -> str:
    """Return the text of a list of parts of the form ``{"type": "text", "text": "..."}``, without separators.

    Args:
        parts: The parts.
        column: The column of the message, for the error message.
        number: The number of the message in the list of messages, from 1.

    Raises:
        RecordError: A part is not text.
    """
    texts = []
    for part in parts:
        fields = part if isinstance(part, Mapping) else {}
        text = fields.get("text")
        if fields.get("type") != "text" or not isinstance(text, str):
            found = f"of type {fields['type']!r:.40}" if fields.get("type") not in ("text", None) else f"{part!r:.40}"
            raise RecordError(
                f"the 'content' of a message in the field '{column}' must be text, got a list with a part {found} "
                f"(message {number})"
            )
        texts.append(text)
    return "".join(texts)
