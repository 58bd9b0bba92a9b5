"""Overrides of Hydra whose values may contain any character."""

import re
from pathlib import Path

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
