"""Text of unknown origin in the terminal."""

JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"


def printable(text: str, limit: int | None = None) -> str:
    """Return a text whose control characters and lone surrogates are escaped, so that a terminal only shows them.

    Args:
        text: Text of a data file or a directory, which may contain terminal sequences. Line feeds are kept.
        limit: Longest result; a longer one loses its middle.
    """
    shown = "".join(char if char.isprintable() or char == "\n" else _escape(char) for char in text)
    if limit is None or len(shown) <= limit:
        return shown
    return f"{shown[: limit // 2]} ... {shown[len(shown) - limit // 2 :]}"


def _escape(char: str) -> str:
    # Spaces such as U+00A0 and the joiners within words and emoji count as not printable, too, but they do no harm.
    return char if (char.isspace() and ord(char) > 0x9F) or char in JOINERS else char.encode("unicode_escape").decode()
