"""Rows of JSONL, JSON, CSV, TSV and Parquet files and of Hub datasets. All but JSON is read by ``datasets``."""

import codecs
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from rlhf.data.csv_files import SEPARATED, SeparatedRows, check_fields, columns_of_numbers, csv_options, separator_of
from rlhf.data.json_files import JsonLines, read_json
from rlhf.data.records import Row
from rlhf.errors import DataError, first_line

LINE_PER_ROW = {".jsonl", ".ndjson"}
EXTENSIONS = (*LINE_PER_ROW, ".json", *SEPARATED, ".parquet")
MAX_NAMED_FILES = 3
PROGRESS_BAR_BYTES = 100_000_000  # smaller files are read within seconds and need no progress bar


def read_rows(
    path: str,
    *,
    split: str = "train",
    subset: str | None = None,
    columns: Mapping[str, str | None] = MappingProxyType({}),
) -> Sequence[Row]:
    """Read the rows of a local file, or of a split of a Hub dataset.

    Args:
        path: A file whose extension determines its format, or a Hub dataset ID such as ``Anthropic/hh-rlhf``.
        split: Split of a Hub dataset; slices such as ``train[:1000]`` are allowed.
        subset: Configuration name of a Hub dataset that has several.
        columns: Maps fields to columns, see ``RecordParser``. It determines which columns of a CSV or TSV file contain
            numbers.

    Raises:
        DataError: There is no such file or dataset, its format is unknown, or its content is invalid.
    """
    if Path(path).is_file() or Path(path).suffix.lower() in EXTENSIONS:
        if subset is not None:
            raise DataError(
                f"data.subset={subset}: {path} is a local file, and only Hub datasets have subsets.",
                "Set data.subset=null.",
            )
        return _read_file(path, columns)
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


def _read_file(path: str, columns: Mapping[str, str | None]) -> Sequence[Row]:
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
    return read_json(path) if extension == ".json" else _read_table(path, columns)


def _read_table(path: str, columns: Mapping[str, str | None]) -> Sequence[Row]:
    """Read a CSV, TSV or Parquet file."""
    from datasets import disable_progress_bars, enable_progress_bars, load_dataset

    extension = Path(path).suffix.lower()
    sep = separator_of(path) if extension in SEPARATED else None
    if sep == "\t":
        check_fields(path, sep)
    (disable_progress_bars if Path(path).stat().st_size < PROGRESS_BAR_BYTES else enable_progress_bars)()
    try:
        if sep is None:
            _check_parquet_rows(path)
        options = {} if sep is None else csv_options(path, sep)
        rows: Sequence[Row] = load_dataset("csv" if options else "parquet", data_files=path, split="train", **options)
        if len(rows):
            rows[0]  # The library reports field names that it does not support only when a row is accessed.
    except DataError:
        raise
    except Exception as error:  # pyarrow, pandas and datasets raise many types for invalid content
        if sep is not None:
            check_fields(path, sep)
        raise DataError(f"{path}: the file cannot be read ({first_line(error.__cause__ or error)}).") from error
    return rows if sep is None else SeparatedRows(rows, *columns_of_numbers(columns))


def _check_parquet_rows(path: str) -> None:
    """Raise an error if a Parquet file has no rows. That of ``datasets`` does not explain it."""
    from pyarrow.parquet import read_metadata

    if not read_metadata(path).num_rows:
        raise _empty(path)


def _empty(path: str) -> DataError:
    return DataError(f"{path}: the file is empty.")


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
