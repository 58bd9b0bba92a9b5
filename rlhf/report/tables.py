"""Tables of a report. A cell keeps its exact value next to the rounded text that is shown."""

import math
from dataclasses import dataclass
from typing import Any

from rlhf.report.events import is_finite


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: What is shown.
        value: Exact value of a number, for sorting; None for text.
        detail: A second line, such as an interval.
        color: Number of the color of a swatch before the text; None for none.
        is_code: Whether the text is a name or a value of a configuration.
    """

    text: str
    value: float | None = None
    detail: str = ""
    color: int | None = None
    is_code: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        columns: Titles.
        rows: Cells of each row.
        id: Identifier in the page.
    """

    columns: list[str]
    rows: list[list[Cell]]
    id: str = ""

    def is_numeric(self, column: int) -> bool:
        """Return whether a column contains numbers, and nothing else except empty cells."""
        cells = [row[column] for row in self.rows if row[column].text]
        return bool(cells) and all(cell.value is not None for cell in cells)


def number(value: Any, detail: str = "") -> Cell:
    """Return the cell of a number; an empty one if there is none."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return Cell("")
    return Cell(rounded(value), float(value) if math.isfinite(value) else None, detail)


def interval(entry: Any) -> Cell:
    """Return the cell of a mean or a win rate with its interval, as evaluation writes them."""
    if not isinstance(entry, dict):
        return Cell("")
    value = entry.get("value", entry.get("mean"))
    low, high = entry.get("low"), entry.get("high")
    has_interval = is_finite(low) and is_finite(high) and (low, high) != (value, value)
    return number(value, f"{rounded(low)} to {rounded(high)}" if has_interval else "")


def text(value: Any, *, color: int | None = None) -> Cell:
    """Return the cell of a text."""
    return Cell(str(value), color=color)


def code(value: Any) -> Cell:
    """Return the cell of a name or of a value of a configuration."""
    return Cell(str(value), is_code=True)


def rounded(value: Any) -> str:
    """Return a number with about four significant digits, and a true minus sign."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        shown = f"{int(value):,}" if abs(value) >= 10_000 else str(int(value))
    elif abs(value) >= 1000:
        shown = f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    elif abs(value) >= 0.1:
        shown = f"{value:.4g}" if abs(value) >= 10 else f"{value:.3f}"
    else:
        shown = f"{value:.3g}"
    return shown.replace("-", "−", 1) if shown.startswith("-") else shown  # noqa: RUF001


def size(count: int) -> Cell:
    """Return the cell of a number of bytes."""
    scaled = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if scaled < 1000 or unit == "GB":
            digits = 0 if scaled >= 100 or unit == "B" else 1
            return Cell(f"{scaled:.{digits}f} {unit}", float(count))
        scaled /= 1000
    raise AssertionError("The last unit has no limit.")


def duration(seconds: float | None) -> str:
    """Return a duration in words; empty if it is unknown."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
