"""Sampled responses as a table: in Markdown for TensorBoard's text tab, and as plain text."""

import re
from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. Line breaks and vertical bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with one line per cell, which shows long texts in full. Rows are numbered from 1."""
    width = max(map(len, header))
    lines = []
    for number, row in enumerate(rows, 1):
        for column, (name, cell) in enumerate(zip(header, row, strict=True)):
            label = f"{f'{number}.' if column == 0 else '':4}{name:{width}}  "
            lines.append(label + cell.strip().replace("\n", "\n" + " " * len(label)))
    return "\n".join(lines)


def _escape(text: str) -> str:
    return re.sub(r"\r\n?|\n", "<br>", text.replace("|", "\\|"))
