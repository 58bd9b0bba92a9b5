"""Rows of JSON and JSON Lines files, parsed by Python's ``json``.

``datasets`` reads these files with pyarrow, which requires one type per field, and which stores lists that start with
null incorrectly (apache/arrow#51305), so that a file can crash the process.
"""

import codecs
import json
import os
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.data.lazy import LazySequence
from rlhf.data.records import FIELDS, RecordError, Row
from rlhf.errors import DataError


class JsonLines(LazySequence[Row]):
    """Rows of a JSON Lines file. A line is parsed when its row is accessed, so memory holds 16 bytes per row.

    Args:
        path: The file, which is not empty. Blank lines are skipped.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._starts, self._numbers = array("Q"), array("Q")
        start = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(line)
        self._end = start

    def __len__(self) -> int:
        return len(self._starts)

    def item(self, index: int) -> Row:
        """Return a row.

        Raises:
            RecordError: The line is not a JSON object.
        """
        line = self._read(index).partition(b"\n")[0].removeprefix(codecs.BOM_UTF8)
        try:
            row = json.loads(line.decode(), object_pairs_hook=_unique_fields)
        except RecordError:
            raise
        except UnicodeDecodeError as error:
            reason = f"the line is not UTF-8 ({error.reason} at byte {error.start})"
            raise RecordError(reason, fix=conversion_to_utf8(self.path)) from error
        except json.JSONDecodeError as error:
            raise RecordError(f"the line is not JSON ({error.msg} at column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise RecordError(f"the line is not JSON that can be read ({type(error).__name__})") from error
        if not isinstance(row, dict):
            raise RecordError(f"the line must be a JSON object, got {type(row).__name__}")
        return row

    def _read(self, index: int) -> bytes:
        """Return the content of the file from a row to the next one."""
        # A mapped file would count as memory of this process.
        start, following = self._starts[index], index + 1
        end = self._starts[following] if following < len(self) else self._end
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), end - start, start)
        self._file.seek(start)  # Windows
        return self._file.read(end - start)

    def line_number(self, index: int) -> int:
        """Return the number of a row's line, from 1. Blank lines count."""
        return self._numbers[index]


def read_json(path: str) -> Sequence[Row]:
    """Read a JSON file: a list of rows, an object with one list of rows, a single row, or JSON Lines.

    Raises:
        DataError: The file is not UTF-8, it is not JSON, or it contains several lists of rows.
    """
    content = Path(path).read_bytes()
    check_utf8(path, content)
    try:
        rows = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique_fields)
    except RecordError as error:
        raise DataError(f"{path}: {error}.") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return JsonLines(path)
        raise DataError(
            f"{path}:{error.lineno}: the file is not JSON ({error.msg} at column {error.colno})."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the file is not JSON that can be read ({type(error).__name__}).") from error
    found: list[Any] = rows if isinstance(rows, list) else _rows_of_object(path, rows)
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: the row must be a JSON object, got {type(row).__name__}.")
    return found


def check_utf8(path: str, content: bytes, start: int = 0) -> None:
    """Raise an error if a part of a file is not UTF-8.

    Args:
        path: The file.
        content: The part.
        start: Position of the part in the file, in bytes.

    Raises:
        DataError: The part is not UTF-8.
    """
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: the file must be UTF-8 ({error.reason} at byte {start + error.start}).",
            conversion_to_utf8(path),
        ) from error


def conversion_to_utf8(path: str) -> str:
    """Return how to convert a file that is not UTF-8, for error messages."""
    with open(path, "rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as PowerShell and Excel write it
    if is_utf16:
        return f"Convert it from UTF-16: iconv -f utf-16 -t utf-8 {path} > <new file>"
    return f"Convert it, for example from Latin-1: iconv -f latin1 -t utf-8 {path} > <new file>"


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RecordError(f"the field {twice!r} is specified twice")
    return fields


def _rows_of_object(path: str, content: Any) -> list[Any]:
    """Return the rows under the one key of an object that contains rows, or else the content as the only row."""
    if not isinstance(content, dict):
        return [content]
    lists = [key for key, value in content.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if not lists or any(key in FIELDS for key in content):
        return [content]
    if len(lists) > 1:
        raise DataError(
            f"{path}: the file contains several lists of rows ({', '.join(lists)}).", "Write one list to each file."
        )
    rows: list[Any] = content[lists[0]]
    return rows
