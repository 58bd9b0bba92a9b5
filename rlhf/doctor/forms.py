"""Which form each row of a file has, and which rows are invalid. A broken row never hides the others."""

from dataclasses import dataclass, field
from pathlib import Path

from rlhf.data.files import LINE_PER_ROW
from rlhf.data.forms import form_of
from rlhf.data.json_files import JsonLines
from rlhf.data.parser import RecordParser
from rlhf.data.reading import RecordReader
from rlhf.data.records import Record, RecordError, Row


@dataclass(frozen=True)
class Invalid:
    """A row that no stage can read.

    Args:
        number: Number of its line, or of its row in a file that has no lines, from 1.
        reason: What is wrong, as a clause.
        missing: The missing field, if that is the reason and it may have another name.
    """

    number: int
    reason: str
    missing: str | None = None


@dataclass(frozen=True)
class Entry:
    """A valid row.

    Args:
        number: Number of its line, or of its row in a file that has no lines, from 1.
        record: The record that the row contains, of the form that its fields belong to.
        row: The fields of the row.
    """

    number: int
    record: Record
    row: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """The rows of one file or Hub dataset.

    Args:
        name: ``train``, ``val`` or ``test``.
        path: The file or the ID of the dataset.
        entries: The valid rows.
        invalid: The other rows.
    """

    name: str
    path: str
    entries: list[Entry]
    invalid: list[Invalid] = field(default_factory=list)

    def location(self, number: int) -> str:
        """Return the location of a row: ``file:line``, or ``file, row n`` in a file that has no lines."""
        return f"{self.path}:{number}" if is_line_per_row(self.path) else f"{self.path}, row {number}"

    def short_location(self, number: int) -> str:
        """Return the location of a row within the file."""
        return f"{'line' if is_line_per_row(self.path) else 'row'} {number}"

    def by_form(self) -> dict[type[Record], list[Entry]]:
        """Return the valid rows of each form that the file contains, the most frequent form first."""
        found: dict[type[Record], list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(type(entry.record), []).append(entry)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def read_split(name: str, path: str, reader: RecordReader) -> Split:
    """Read all rows of a file or a Hub dataset.

    Args:
        name: ``train``, ``val`` or ``test``.
        path: A file, or the ID of a Hub dataset.
        reader: The parser, the split names and the maximum number of rows.

    Raises:
        DataError: There is no such file, or a file that is not JSONL cannot be read.
    """
    entries: list[Entry] = []
    invalid: list[Invalid] = []
    rows = reader.rows(path, name)
    for index in range(len(rows) if reader.max_rows is None else min(reader.max_rows, len(rows))):
        number = rows.line_number(index) if isinstance(rows, JsonLines) else index + 1
        try:
            row = rows[index]
            entries.append(Entry(number, parse_row(reader.parser, row), row))
        except RecordError as error:
            invalid.append(Invalid(number, str(error), None if error.is_null else error.missing))
        except Exception as error:  # A value that the parser does not expect must not hide the other rows.
            invalid.append(Invalid(number, f"the row cannot be parsed ({type(error).__name__}: {error})"))
    return Split(name, path, entries, invalid)


def parse_row(parser: RecordParser, row: Row) -> Record:
    """Parse a row as a record of the form that its fields belong to.

    Raises:
        RecordError: The row is invalid, or it has no field of any form.
    """
    record: Record = parser.parse(row, form_of(parser, row))
    return record


def is_line_per_row(path: str) -> bool:
    """Return whether each line of a file is a row."""
    return Path(path).suffix.lower() in LINE_PER_ROW
