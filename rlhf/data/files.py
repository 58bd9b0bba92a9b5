"""Rows of JSONL, JSON, CSV, TSV and Parquet files and of Hub datasets, read with the ``datasets`` library."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.data.records import FIELDS
from rlhf.errors import DataError

BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SEPARATED = {".csv", ".tsv"}
LINE_PER_ROW = {".jsonl", ".ndjson"}
PROGRESS_BAR_BYTES = 100_000_000  # smaller files are read within seconds and need no progress bar


def read_rows(path: str, *, split: str = "train", subset: str | None = None) -> Sequence[dict[str, Any]]:
    """Read the rows of a local file, or of a split of a Hub dataset.

    Args:
        path: A file whose extension determines its format, or a Hub dataset ID such as ``Anthropic/hh-rlhf``.
        split: Split of a Hub dataset; slices such as ``train[:1000]`` are allowed.
        subset: Configuration name of a Hub dataset that has several.

    Raises:
        DataError: There is no such file or dataset, its format is unknown, or its content is invalid.
    """
    from datasets import load_dataset

    if Path(path).is_file() or Path(path).suffix.lower() in BUILDERS:
        if subset is not None:
            raise DataError(
                f"data.subset={subset}: {path} is a local file, and only Hub datasets have subsets.",
                "Set data.subset=null.",
            )
        return _read_file(path)
    try:
        rows: Sequence[dict[str, Any]] = load_dataset(path, subset, split=split)
    except Exception as error:  # the Hub client raises dozens of types, from an unknown dataset to no network
        raise DataError(
            f"{path}: neither a local file nor a Hub dataset that can be loaded ({_reason(error)}).",
            "For a local file: data=jsonl data.train=<file>. For a Hub dataset: data=hub data.train=<owner/name>",
        ) from error
    return rows


def _read_file(path: str) -> Sequence[dict[str, Any]]:
    from datasets import disable_progress_bars, enable_progress_bars, load_dataset

    extension = Path(path).suffix.lower()
    if Path(path).is_dir():
        raise DataError(f"{path}: this is a folder, not a file.", f"Name one of its files: data.train={path}/<file>")
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file.", "Relative paths are resolved against the current directory.")
    if extension not in BUILDERS:
        raise DataError(
            f"{path}: the file extension '{extension}' is not supported.", f"Supported: {' '.join(BUILDERS)}"
        )
    if not Path(path).stat().st_size:
        raise DataError(f"{path}: the file is empty.")
    if extension != ".parquet":
        _check_encoding(path)
    (disable_progress_bars if Path(path).stat().st_size < PROGRESS_BAR_BYTES else enable_progress_bars)()
    options = _json_options(path) if extension == ".json" else _csv_options(path) if extension in SEPARATED else {}
    try:
        rows: Sequence[dict[str, Any]] = load_dataset(BUILDERS[extension], data_files=path, split="train", **options)
        if len(rows):
            rows[0]  # The library reports field names that it does not support only when a row is accessed.
    except Exception as error:  # pyarrow, pandas and datasets raise many types for invalid content
        if extension in LINE_PER_ROW:
            _find_invalid_line(path)
        raise DataError(f"{path}: the file cannot be read ({_reason(error)}).") from error
    return rows


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
    numbers = dict(enumerate(number for number, _ in islice(_lines(path), last + 1)))
    return [f"{path}:{numbers[row]}" if row in numbers else path for row in rows]


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield the number and text of every line that is not blank."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _check_encoding(path: str) -> None:
    """Raise an error if a file is not UTF-8. The ``datasets`` library would fail only when a row is accessed."""
    try:
        for _ in _lines(path):
            pass
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: the file must be UTF-8 ({error.reason} at byte {error.start}).",
            f"Convert it, for example from Latin-1: iconv -f latin1 -t utf-8 {path} > <new file>",
        ) from error


def _json_options(path: str) -> dict[str, Any]:
    """Return the key that contains the rows of a JSON file, if it is an object with one list of rows."""
    with open(path, encoding="utf-8-sig") as file:
        if file.read(1) != "{":
            return {}
        file.seek(0)
        try:
            content = json.load(file)
        except json.JSONDecodeError:  # JSON Lines, or invalid: ``datasets`` decides.
            return {}
    lists = [key for key, value in content.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if not lists or any(key in FIELDS for key in content):
        return {}
    if len(lists) > 1:
        raise DataError(
            f"{path}: the file contains several lists of rows ({', '.join(lists)}).", "Write one list to each file."
        )
    return {"field": lists[0]}


def _csv_options(path: str) -> dict[str, Any]:
    """Return the separator of a CSV or TSV file. Spreadsheets write semicolons where the comma is a decimal mark."""
    if Path(path).suffix.lower() == ".tsv":
        return {"sep": "\t"}
    with open(path, encoding="utf-8-sig") as file:
        header = file.readline()
    if header.lstrip().startswith(("{", "[")):
        raise DataError(
            f"{path}: the content is JSON, but the file extension is .csv.",
            f"Rename the file: {Path(path).with_suffix('.jsonl')}",
        )
    return {"sep": ";"} if ";" in header and "," not in header else {}


def _find_invalid_line(path: str) -> None:
    """Raise an error that names the first line that is not valid JSON or does not match the lines before it."""
    types: dict[str, tuple[type, int]] = {}
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: the line is not JSON ({error.msg} at column {error.colno}).") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: the line must be a JSON object, got {type(row).__name__}.")
        if surrogate := re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise DataError(f"{path}:{number}: the line contains {surrogate[0]!a}, which is half of a surrogate pair.")
        for key, value in row.items():
            expected, first = types.setdefault(key, (type(value), number))
            if expected is type(None) or value is None or {expected, type(value)} == {int, float}:
                continue
            if expected is not type(value):
                raise DataError(
                    f"{path}:{number}: the field '{key}' must have one type in all lines, got {type(value).__name__} "
                    f"here and {expected.__name__} in line {first}."
                )


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
