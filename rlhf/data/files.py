"""Rows from JSONL, JSON, CSV and Parquet files and from the hub, all through the ``datasets`` library."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
LINE_PER_ROW = {".jsonl", ".ndjson"}
SMALL = 100_000_000  # bytes


def read_rows(path: str, *, split: str = "train", subset: str | None = None) -> Sequence[dict[str, Any]]:
    """The rows of a local file, or of a split of a hub data set.

    Args:
        path: a file whose ending names its format, or a hub id such as ``Anthropic/hh-rlhf``.
        split: which split of a hub data set; slices such as ``train[:1000]`` work.
        subset: the configuration of a hub data set that has several.

    Raises:
        UserError: nothing there, an unknown ending, or a line that is no JSON.
    """
    from datasets import disable_progress_bars, enable_progress_bars, load_dataset
    from datasets.exceptions import DatasetGenerationError

    ending = Path(path).suffix.lower()
    if Path(path).is_file() or ending in BUILDERS:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file", "the path is relative to the folder you started in")
        if ending not in BUILDERS:
            raise UserError(f"{path}: cannot tell its format from '{ending}'", f"endings read: {' '.join(BUILDERS)}")
        if not Path(path).stat().st_size:
            raise UserError(f"{path}: the file is empty")
        if ending in LINE_PER_ROW:
            _check_encoding(path)
        # a bar is for what takes longer than a few seconds
        (disable_progress_bars if Path(path).stat().st_size < SMALL else enable_progress_bars)()
        options = {"sep": "\t"} if ending == ".tsv" else {}
        try:
            return load_dataset(BUILDERS[ending], data_files=path, split="train", **options)
        except (DatasetGenerationError, ValueError, OSError) as error:
            _find_bad_line(path, ending)
            raise UserError(f"{path}: cannot be read ({_reason(error)})") from error
    try:
        return load_dataset(path, subset, split=split)
    except Exception as error:  # the hub client raises dozens of types, from no such set to no network
        raise UserError(
            f"{path}: neither a file here nor a data set of the hub that can be reached ({_reason(error)})",
            "data=jsonl data.train=<file>, or data=hub data.train=<owner/name>",
        ) from error


def where(path: str, row: int) -> str:
    """Where a row stands: ``file:line`` for a file of lines, ``file, row n`` for others; rows count from 0."""
    if Path(path).suffix.lower() not in LINE_PER_ROW:
        return f"{path}, row {row + 1}"
    for seen, (number, _) in enumerate(_lines(path)):
        if seen == row:
            return f"{path}:{number}"
    return path


def _lines(path: str) -> Iterator[tuple[int, str]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _check_encoding(path: str) -> None:
    """The reader would only stumble over other bytes once their row is asked for."""
    try:
        for _ in _lines(path):
            pass
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error


def _find_bad_line(path: str, ending: str) -> None:
    """Raise an error that names the first line a reader of JSON lines would stumble over."""
    if ending not in LINE_PER_ROW:
        return
    kinds: dict[str, tuple[type, int]] = {}
    try:
        for number, line in _lines(path):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: a line holds one JSON object, this is {type(row).__name__}")
            for key, value in row.items():
                kind, first = kinds.setdefault(key, (type(value), number))
                if (
                    value is not None
                    and kind is not type(None)
                    and kind is not type(value)
                    and {kind, type(value)} != {int, float}
                ):
                    raise UserError(
                        f"{path}:{number}: field '{key}' is {type(value).__name__}, but {kind.__name__} in line {first}"
                    )
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
