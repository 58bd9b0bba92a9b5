"""Sampled responses as a table: in Markdown for TensorBoard's text tab, and as plain text for ``<stage>.log``."""

from collections.abc import Iterable, Sequence

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from rlhf.logs import TextLogger


def log_table(
    loggers: Iterable[Logger],
    header: Sequence[str],
    rows: Sequence[Sequence[str | float]],
    *,
    name: str,
    step: int,
) -> None:
    """Write a table to TensorBoard's text tab and to the text log. Other loggers are left out.

    Args:
        loggers: The loggers of the Trainer.
        header: Names of the columns.
        rows: Cells of each row: text, or numbers, which are shown with four digits.
        name: Name of the table.
        step: The optimizer step.
    """
    cells = [[cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row] for row in rows]
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown_table(header, cells), step)
        elif isinstance(logger, TextLogger):
            logger.log_text(f"{name}\n{text_table(header, cells)}", step)


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
    return text.replace("|", "\\|").replace("\n", "<br>")
