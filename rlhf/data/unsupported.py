"""Detect content that records do not hold, such as tools: the model would be trained on what is left of the row."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.records import RecordError

EMPTY_TEXTS = ("", "[]", "{}", "null", "None")  # A column of text may contain JSON.
TOOL_CALLS = ("tool_calls", "function_call")  # of OpenAI; the second one is the older form
REASONING = ("reasoning_content", "reasoning", "thinking")


def check_message(message: Mapping[str, Any], column: str, *, is_learned: bool) -> None:
    """Raise an error if a message has tool calls, or if it is learned without its reasoning or its weight.

    Args:
        message: The message.
        column: Its column, for the error message.
        is_learned: Whether it may carry loss. Other messages are only read, so they may have a weight of 0, and
            reasoning that the chat template would remove.
    """
    if len(message) == 2 and ("content" in message or "value" in message):
        return
    if any(_is_filled(message.get(name)) for name in TOOL_CALLS):
        raise RecordError(f"a message in the field '{column}' has tool calls, which are not supported")
    if not is_learned:
        return
    if name := next((name for name in REASONING if _is_filled(message.get(name))), None):
        raise RecordError(
            f"a message in the field '{column}' has reasoning in '{name}', which is not supported",
            fix=f"Write the reasoning into the 'content' of the message, or remove '{name}' to train without it.",
        )
    if (weight := message.get("weight")) not in (None, 1):
        raise RecordError(
            f"a message in the field '{column}' has the weight {weight!r:.40}, but weights are not supported",
            fix="Remove the weights, and select the messages that carry loss with data.loss_on.",
        )


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
