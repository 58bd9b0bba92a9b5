"""Overrides of Hydra whose values may contain any character, and the keys that overrides name."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WORD = r"[\w./:@+-]+"
_PLAIN = re.compile(rf"{_WORD}( {_WORD})*", re.ASCII)
_NOT_TEXT = re.compile(r"null|true|false|[-+]?(\.?\d[\d._e+-]*|inf|nan)", re.ASCII | re.IGNORECASE)


def quote(value: str | Path, mark: str = "'") -> str:
    """Return a text in the quotes that make Hydra read it as it is.

    Args:
        value: The text.
        mark: The quotation mark. Double quotes are easier to read where the shell needs apostrophes around them.
    """
    # Hydra reads a backslash as an escape only before a quotation mark, the closing one included.
    escaped = re.sub(rf"(\\*)({mark}|\Z)", lambda match: 2 * match[1] + match[2].replace(mark, f"\\{mark}"), str(value))
    return f"{mark}{escaped}{mark}"


def to_value(value: Any) -> str:
    """Return a value of a configuration as it is typed in an override, with quotes where Hydra requires them."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(to_value, value))}]"
    text = str(value)
    is_plain = not isinstance(value, str) or not _NOT_TEXT.fullmatch(text)
    return text if is_plain and _PLAIN.fullmatch(text) else quote(text, '"')


def to_override(key: str, value: Any) -> str:
    """Return ``key=value`` for one argument of a command, not yet quoted for the shell."""
    return f"{key}={to_value(value)}"


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full key and the value of every setting below a node of a configuration. A list is one value."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, node
