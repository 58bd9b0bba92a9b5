"""Detect tools and their calls, which records do not contain: the model would be trained on what is left of them."""

from collections.abc import Mapping, Sequence
from typing import Any

EMPTY_TEXTS = ("", "[]", "{}", "null", "None")  # A column of text may contain JSON.


def has_tool_calls(message: Mapping[str, Any]) -> bool:
    """Return whether a message calls tools in the form of OpenAI: ``tool_calls``, or ``function_call`` before it."""
    return any(_is_filled(message.get(name)) for name in ("tool_calls", "function_call"))


def has_tools(row: Mapping[str, Any]) -> bool:
    """Return whether a row describes tools in its field ``tools``: a list, or a list as JSON."""
    tools = row.get("tools")
    if isinstance(tools, str) and not tools.lstrip().startswith(("[", "{")):
        return False  # A column of other content.
    return _is_filled(tools)


def _is_filled(value: Any) -> bool:
    """Return whether a value contains anything. Columns of Arrow fill objects that a row does not have with None."""
    if isinstance(value, str):
        return value.strip() not in EMPTY_TEXTS
    if isinstance(value, Mapping):
        return any(map(_is_filled, value.values()))
    if isinstance(value, Sequence):
        return any(map(_is_filled, value))
    return value is not None and value is not False
