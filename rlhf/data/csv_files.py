"""Rows of CSV and TSV files. ``datasets`` reads their cells as text; numbers and labels are converted row by row.

The type of a column would otherwise depend on its first 10,000 rows, and its texts on whether they look like numbers.
"""

import csv
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rlhf.data.json_files import check_utf8
from rlhf.data.lazy import LazySequence
from rlhf.data.records import RecordError, Row
from rlhf.errors import DataError

SEPARATED = {".csv": ",", ".tsv": "\t"}  # what separates the fields
NUMBERS = ("margin", "reward", "label")  # fields that are not text
MISSING = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")  # cells of NUMBERS without a number
TRUTH = {"true": True, "false": False, "1": 1, "0": 0}  # cells of labels, in lower case
LONGEST_CELL = 2**31 - 1  # characters; Python's csv module allows 131,072 of them by default


class SeparatedRows(LazySequence[Row]):
    """Rows of a CSV or TSV file. An empty cell is None.

    Args:
        rows: The rows, in which every cell is text.
        numbers: The columns of numbers. A cell that is not a number remains text, which makes its row invalid.
        labels: The columns of labels, which are true, false or numbers.
        sep: What separates the cells. With a tab, a cell may not contain both a tab and a line break: most TSV files
            are not quoted, and the lines after a cell that begins with a quotation mark would be read as its text.
    """

    def __init__(self, rows: Any, numbers: Collection[str], labels: Collection[str], sep: str) -> None:
        self._rows, self._sep = rows, sep
        self.column_names: list[str] = rows.column_names
        self._converters = {name: _number for name in self.column_names if name in numbers}
        self._converters |= {name: _label for name in self.column_names if name in labels}

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int) -> Row:
        """Return a row.

        Raises:
            RecordError: A cell contains several lines of a TSV file.
        """
        row = {name: cell or None for name, cell in self._rows[index].items()}
        if self._sep == "\t" and (name := next((name for name, cell in row.items() if _has_lines(cell)), None)):
            raise RecordError(
                f"the field '{name}' contains a tab and a line break, as if it began with a quotation mark that is "
                "not closed on its line",
                fix="Quote each cell that contains a quotation mark, and write the quotation mark twice.",
            )
        for name, convert in self._converters.items():
            row[name] = convert(row[name] or "")
        return row


def _has_lines(cell: str | None) -> bool:
    return cell is not None and "\n" in cell and "\t" in cell


def _number(cell: str) -> float | str | None:
    if cell in MISSING:
        return None
    try:
        return cell if "_" in cell else float(cell)  # Python allows underscores within numbers.
    except ValueError:
        return cell


def _label(cell: str) -> bool | float | str | None:
    return TRUTH.get(cell.lower(), _number(cell))


def columns_of_numbers(columns: Mapping[str, str | None]) -> tuple[set[str], set[str]]:
    """Return the columns of numbers and those of labels.

    Args:
        columns: Maps fields to columns, see ``RecordParser``.
    """
    texts = {column for name, column in columns.items() if name not in NUMBERS}
    margin, reward, label = (columns.get(name) or name for name in NUMBERS)
    return {margin, reward} - texts, {label} - texts


def csv_options(path: str, sep: str) -> dict[str, Any]:
    """Return how ``datasets`` reads a file: all cells as text, also those that look like numbers or like ``None``.

    Raises:
        DataError: The file has no rows, or its first row has more fields than the header.
    """
    import pandas
    from datasets import Features, Value

    start = pandas.read_csv(path, sep=sep, nrows=1)
    if not len(start):
        raise DataError(f"{path}: the file is empty.")
    if not isinstance(start.index, pandas.RangeIndex):
        # The first row has more fields than the header. pandas would read the first ones as names of the rows, and
        # the others one column too far to the left.
        check_field_counts(path, sep)
        raise DataError(f"{path}: the first row has more fields than the header.", _quoting(sep))
    features = Features({name: Value("string") for name in start.columns})
    return {"sep": sep, "features": features, "keep_default_na": False, "na_filter": False}


def separator_of(path: str) -> str:
    """Return what separates the fields of a CSV or TSV file. Spreadsheets write semicolons where the comma is a decimal
    mark.

    Raises:
        DataError: The file is not UTF-8, or it contains JSON.
    """
    with open(path, "rb") as file:
        start = 0
        for line in file:
            check_utf8(path, line, start)
            start += len(line)
    with open(path, encoding="utf-8-sig") as text:
        header = text.readline()
    extension = Path(path).suffix.lower()
    if header.lstrip().startswith(("{", "[")):
        raise DataError(
            f"{path}: the content is JSON, but the file extension is {extension}.",
            f"Rename the file: {Path(path).with_suffix('.jsonl')}",
        )
    return ";" if extension == ".csv" and ";" in header and "," not in header else SEPARATED[extension]


def check_field_counts(path: str, sep: str) -> None:
    """Raise an error that names the first row of a CSV or TSV file with more fields than the header, if there is one.

    This takes several times as long as reading the file with pandas.
    """
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=sep)
            header, line = 0, 1
            for row in rows:
                header = header or len(row)
                if len(row) > header:
                    raise DataError(
                        f"{path}:{line}: the row has {len(row)} fields, but the header has {header}.", _quoting(sep)
                    )
                line = rows.line_num + 1
    except csv.Error:  # Content that only pandas can read.
        return
    finally:
        csv.field_size_limit(limit)


def _quoting(sep: str) -> str:
    name = {",": "comma", ";": "semicolon", "\t": "tab"}[sep]
    return f"Quote fields that contain a {name}, and name every column in the header."
