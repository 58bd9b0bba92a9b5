"""Messages of conversations: lists of messages, and transcripts in the format of HH."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.records import Message, Prompt, RecordError
from rlhf.data.unsupported import check_message

SURROGATE = re.compile("[\ud800-\udfff]")
TURN = re.compile("\n\n(Human|Assistant):")  # The first turn of a transcript may lack the line feeds.
# Roles in lower case, also those of other formats. ShareGPT has ``from`` and ``value`` instead of ``role`` and
# ``content``. Other roles, such as ``tool``, are left to the chat template.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}


def role_of(message: Mapping[str, Any]) -> Any:
    """Return the role of a message under the name that chat templates have for it."""
    role = message.get("role", message.get("from"))
    return ROLES.get(role.lower(), role) if isinstance(role, str) else role


def parse_messages(value: Any, column: str, *, all_learned: bool = False) -> list[Message]:
    """Parse a list of messages.

    Args:
        value: The list.
        column: Its column, for the error message.
        all_learned: Whether all messages by the assistant carry loss, not only the last one.

    Raises:
        RecordError: It is not a list of messages, or a message has content that is not supported.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RecordError(f"the field '{column}' must be text or a list of messages, got {value!r:.40}")
    messages = []
    for number, message in enumerate(value, 1):
        fields = message if isinstance(message, Mapping) else {}
        role, content = role_of(fields), fields.get("content", fields.get("value"))
        check_message(fields, column, is_learned=role == "assistant" and (all_learned or number == len(value)))
        if isinstance(content, list) and content:
            content = _joined_text(content, column, number)
        if not isinstance(role, str) or not isinstance(content, str):
            raise RecordError(f"every message in the field '{column}' must have a 'role' and a 'content' string")
        check_characters(column, content)
        messages.append({"role": role, "content": content})
    return messages


def _joined_text(parts: list[Any], column: str, number: int) -> str:
    """Return the text of parts such as ``{"type": "text", "text": "..."}``, as chat templates of multimodal models and
    TRL have them, without separators.
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


def parse_history(value: Any, column: str) -> list[Message]:
    """Parse the turns before a prompt: messages, or pairs of a user message and a response, as in LLaMA-Factory.

    Text is content of another kind, and is ignored.

    Args:
        value: The content of the field.
        column: Its column, for the error message.

    Raises:
        RecordError: It is a list of something else.
    """
    if not value or not isinstance(value, list):
        return []
    if not all(isinstance(turn, Mapping) and role_of(turn) for turn in value):
        for pair in value:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise RecordError(
                    f"the field '{column}' must be a list of messages, or of pairs of a user message and a response, "
                    f"got {pair!r:.40}",
                    fix="To ignore the field: data.columns.history=",
                )
        roles = "user", "assistant"
        value = [{"role": role, "content": text} for pair in value for role, text in zip(roles, pair, strict=True)]
    return parse_messages(value, column)


def parse_transcript(text: str, column: str) -> list[Message]:
    """Parse the ``\\n\\nHuman: ... \\n\\nAssistant: ...`` format of HH (Bai et al. 2022, arXiv:2204.05862).

    Args:
        text: The transcript.
        column: Its column, for the error message.

    Raises:
        RecordError: There is text before the first turn.
    """
    check_characters(column, text)
    before, *turns = TURN.split("\n\n" + text.lstrip())
    if before.strip():
        raise RecordError(
            f"the field '{column}' contains text before its first turn: {before.strip()!r:.40}",
            fix="Begin the transcript with 'Human:'.",
        )
    roles, contents = turns[::2], turns[1::2]
    return [
        {"role": "user" if role == "Human" else "assistant", "content": content.strip()}
        for role, content in zip(roles, contents, strict=True)
    ]


def is_transcript_prompt(text: str) -> bool:
    """Return whether a text is a transcript in the format of HH that ends where the assistant responds."""
    return text.rstrip().endswith("\n\nAssistant:") and text.lstrip().startswith("Human:")


def check_characters(column: str, text: str) -> None:
    """Raise an error if a text cannot be encoded: JSON may contain escaped halves of a surrogate pair."""
    if not text.isascii() and (surrogate := SURROGATE.search(text)):
        raise RecordError(f"the field '{column}' contains {surrogate[0]!a}, which is half of a surrogate pair")


def conversation(messages: Sequence[Message]) -> Prompt:
    """Return a conversation up to the next response.

    Raises:
        RecordError: The last message is by the assistant.
    """
    if not messages or messages[-1]["role"] == "assistant":
        raise RecordError("the conversation before the response must end with a user message")
    if len(messages) == 1:
        return Prompt(messages, messages[0]["content"])
    return Prompt(messages, "\n\n".join(f"{message['role']}: {message['content']}" for message in messages))
