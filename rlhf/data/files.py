"""Rows of JSONL, JSON, CSV, TSV and Parquet files and of Hub datasets. All but JSON is read by ``datasets``."""

import codecs
import csv
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.data.json_files import JsonLines, check_utf8, read_json
from rlhf.data.records import FIELDS, Row
from rlhf.errors import DataError, first_line

LINE_PER_ROW = {".jsonl", ".ndjson"}
SEPARATED = {".csv": ",", ".tsv": "\t"}  # what separates the fields
EXTENSIONS = (*LINE_PER_ROW, ".json", *SEPARATED, ".parquet")
NUMBERS = ("margin", "reward", "label")  # columns of a CSV or TSV file that do not contain text
TEXTS = (*(name for name in FIELDS if name not in NUMBERS), "instruction", "input", "output")  # the last are of Alpaca
MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]  # cells of NUMBERS without a number
MAX_NAMED_FILES = 3
PROGRESS_BAR_BYTES = 100_000_000  # smaller files are read within seconds and need no progress bar
LONGEST_CELL = 2**31 - 1  # characters; Python's csv module allows 131,072 of them by default


def read_rows(path: str, *, split: str = "train", subset: str | None = None) -> Sequence[Row]:
    """Read the rows of a local file, or of a split of a Hub dataset.

    Args:
        path: A file whose extension determines its format, or a Hub dataset ID such as ``Anthropic/hh-rlhf``.
        split: Split of a Hub dataset; slices such as ``train[:1000]`` are allowed.
        subset: Configuration name of a Hub dataset that has several.

    Raises:
        DataError: There is no such file or dataset, its format is unknown, or its content is invalid.
    """
    if Path(path).is_file() or Path(path).suffix.lower() in EXTENSIONS:
        if subset is not None:
            raise DataError(
                f"data.subset={subset}: {path} is a local file, and only Hub datasets have subsets.",
                "Set data.subset=null.",
            )
        return _read_file(path)
    from datasets import load_dataset  # Imported here because it takes a second, which JSON does not need.

    try:
        rows: Sequence[Row] = load_dataset(path, subset, split=split)
    except Exception as error:  # the Hub client raises dozens of types, from an unknown dataset to no network
        reason = first_line(error.__cause__ or error)
        raise DataError(
            f"{path}: neither a local file nor a Hub dataset that can be loaded ({reason}).",
            "For a local file: data=jsonl data.train=<file>. For a Hub dataset: data=hub data.train=<owner/name>",
        ) from error
    return rows


def refuse_directory(path: str) -> None:
    """Raise an error that names a file in it if a path is a directory."""
    if Path(path).is_dir():
        files = sorted(file for file in Path(path).glob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
        named = " or ".join(f"data.train={file}" for file in files[:MAX_NAMED_FILES]) or f"data.train={path}/<file>"
        raise DataError(f"{path} is a directory.", f"Name one of its files: {named}")


def _read_file(path: str) -> Sequence[Row]:
    extension = Path(path).suffix.lower()
    refuse_directory(path)
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file.", "Relative paths are resolved against the current directory.")
    if extension not in EXTENSIONS:
        raise DataError(
            f"{path}: the file extension '{extension}' is not supported.", f"Supported: {' '.join(EXTENSIONS)}"
        )
    if not Path(path).stat().st_size:
        raise _empty(path)
    if extension in LINE_PER_ROW:
        return JsonLines(path)
    return read_json(path) if extension == ".json" else _read_table(path)


def _read_table(path: str) -> Sequence[Row]:
    """Read a CSV, TSV or Parquet file."""
    from datasets import disable_progress_bars, enable_progress_bars, load_dataset

    extension = Path(path).suffix.lower()
    sep = _separator(path) if extension in SEPARATED else None
    (disable_progress_bars if Path(path).stat().st_size < PROGRESS_BAR_BYTES else enable_progress_bars)()
    try:
        if sep is None:
            _check_parquet_rows(path)
        options = {} if sep is None else _csv_options(path, sep)
        rows: Sequence[Row] = load_dataset("csv" if options else "parquet", data_files=path, split="train", **options)
        if len(rows):
            rows[0]  # The library reports field names that it does not support only when a row is accessed.
    except DataError:
        raise
    except Exception as error:  # pyarrow, pandas and datasets raise many types for invalid content
        if sep is not None:
            _check_field_counts(path, sep)
        raise DataError(f"{path}: the file cannot be read ({first_line(error.__cause__ or error)}).") from error
    return rows


def _check_parquet_rows(path: str) -> None:
    """Raise an error if a Parquet file has no rows. That of ``datasets`` does not explain it."""
    from pyarrow.parquet import read_metadata

    if not read_metadata(path).num_rows:
        raise _empty(path)


def _csv_options(path: str, sep: str) -> dict[str, Any]:
    """Return how pandas reads a file: texts as they are, although they look like numbers or like ``None``.

    An empty cell is missing. Columns of other names contain numbers if all their cells do.
    """
    import pandas

    start = pandas.read_csv(path, sep=sep, nrows=1)
    if not len(start):
        raise _empty(path)
    if not isinstance(start.index, pandas.RangeIndex):
        # The first row has more fields than the header. pandas would read the first ones as names of the rows, and
        # the others one column too far to the left.
        _check_field_counts(path, sep)
        raise DataError(f"{path}: the first row has more fields than the header.", _quoting(sep))
    return {
        "sep": sep,
        "converters": dict.fromkeys(TEXTS, _text),
        "keep_default_na": False,
        "na_values": {name: MISSING if name in NUMBERS else [""] for name in start.columns},
    }


def _check_field_counts(path: str, sep: str) -> None:
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


def _empty(path: str) -> DataError:
    return DataError(f"{path}: the file is empty.")


def _text(cell: str) -> str | None:
    return cell or None


def location(path: str, row: int) -> str:
    """Return the location of a row: ``file:line`` for JSONL, ``file, row n`` for other formats.

    Args:
        path: A file or a Hub dataset ID.
        row: Index of the row, from 0. The returned line and row numbers start from 1.
    """
    return locations(path, [row])[0]


def locations(path: str, rows: Sequence[int]) -> list[str]:
    """Return the location of each of several rows, see ``location``. The file is read once."""
    if Path(path).suffix.lower() not in LINE_PER_ROW:
        return [f"{path}, row {row + 1}" for row in rows]
    last = max(rows, default=-1)
    with open(path, "rb") as file:
        filled = (number for number, line in enumerate(file, 1) if line.removeprefix(codecs.BOM_UTF8).strip())
        numbers = list(islice(filled, last + 1))
    return [f"{path}:{numbers[row]}" if row < len(numbers) else path for row in rows]


def _separator(path: str) -> str:
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
