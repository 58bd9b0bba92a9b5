"""Rows of CSV and TSV files. ``datasets`` reads their cells as text; numbers and labels are converted row by row.

The type of a column would otherwise depend on its first 10,000 rows, and its texts on whether they look like numbers.
"""

import csv
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rlhf.data.json_files import check_utf8
from rlhf.data.lazy import LazySequence
from rlhf.data.records import Row
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
    """

    def __init__(self, rows: Any, numbers: Collection[str], labels: Collection[str]) -> None:
        self._rows = rows
        self.column_names: list[str] = rows.column_names
        self._converters = {name: _number for name in self.column_names if name in numbers}
        self._converters |= {name: _label for name in self.column_names if name in labels}

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int) -> Row:
        row = {name: cell or None for name, cell in self._rows[index].items()}
        for name, convert in self._converters.items():
            row[name] = convert(row[name] or "")
        return row


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
        check_fields(path, sep)
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


def check_fields(path: str, sep: str) -> None:
    """Raise an error that names the first row of a CSV or TSV file with invalid fields, if there is one.

    No row may have more fields than the header. In a TSV file, a field that begins with a quotation mark must be quoted
    correctly: most TSV files are not quoted, and the lines after such a field would be read as its text.

    This takes several times as long as reading the file with pandas.
    """
    limit = csv.field_size_limit(LONGEST_CELL)
    header, line = 0, 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=sep, strict=sep == "\t")
            for row in rows:
                header = header or len(row)
                if len(row) > header:
                    raise DataError(
                        f"{path}:{line}: the row has {len(row)} fields, but the header has {header}.", _quoting(sep)
                    )
                line = rows.line_num + 1
    except csv.Error as error:
        if sep == "\t":  # In other files, only pandas can read the content.
            raise DataError(
                f"{path}:{line}: a field begins with a quotation mark, but is not quoted correctly.",
                "Quote each field that contains a quotation mark, and write the quotation mark twice.",
            ) from error
    finally:
        csv.field_size_limit(limit)


def _quoting(sep: str) -> str:
    name = {",": "comma", ";": "semicolon", "\t": "tab"}[sep]
    return f"Quote fields that contain a {name}, and name every column in the header."
