"""Overrides of Hydra whose values may contain any character, and the keys that overrides name."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WORD = r"[\w./:@+-]+"
_PLAIN = re.compile(rf"{_WORD}( {_WORD})*", re.ASCII)


def quote(value: str | Path) -> str:
    """Return a value in the quotes that make Hydra read it as it is."""
    # Hydra reads a backslash as an escape only before an apostrophe, the closing one included.
    escaped = re.sub(r"(\\*)('|\Z)", lambda match: 2 * match[1] + match[2].replace("'", r"\'"), str(value))
    return f"'{escaped}'"


def to_override(key: str, value: str | Path) -> str:
    """Return ``key=value``, with quotes where Hydra requires them."""
    return f"{key}={value if _PLAIN.fullmatch(str(value)) else quote(value)}"


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full key and the value of every setting below a node of a configuration. A list is one value."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, node
