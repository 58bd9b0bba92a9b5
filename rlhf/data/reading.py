"""Read the records of a file or a Hub dataset, and report the rows that are not valid records."""

import logging
import random
import re
from array import array
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from rich.markup import escape
from rich.progress import track

from rlhf.data.cache import CACHED_ROWS, DataCache, content_key
from rlhf.data.files import location, read_rows, refuse_directory
from rlhf.data.forms import form_of
from rlhf.data.hints import hints, parses
from rlhf.data.lazy import LazySequence
from rlhf.data.parser import RecordParser
from rlhf.data.records import EXPECTED, Preference, Record, RecordError, Row, UnpairedPreference, prompt_of
from rlhf.data.report import report_records
from rlhf.errors import DataError

log = logging.getLogger(__name__)
MAX_SHOWN_ERRORS = 5
PROGRESS_BAR_ROWS = 100_000  # fewer rows are parsed within seconds
UNDESIRABLE = (
    "false no 0 bad negative neg undesirable undesired rejected dispreferred dislike disliked incorrect wrong fail "
    "unhelpful not_helpful unsafe harmful toxic thumbs_down downvote"
).split()
DESIRABLE = (
    "true yes 1 good positive pos desirable desired chosen accepted preferred like liked correct right pass helpful "
    "safe harmless non_toxic thumbs_up upvote"
).split()
EVERY_COLUMN = "**"  # among names of columns: all columns of the data
CLASSES = {**dict.fromkeys(UNDESIRABLE, False), **dict.fromkeys(DESIRABLE, True)}  # what names of labels mean


@dataclass(frozen=True)
class RecordReader:
    """Reads records.

    Args:
        parser: Turns rows into records.
        splits: Maps ``train``, ``val`` and ``test`` to the split names of a Hub dataset.
        subset: Configuration name of a Hub dataset that has several.
        max_rows: Maximum number of rows to read from each split; None for all.
        on_error: ``stop`` at invalid rows, or ``skip`` and count them.
    """

    parser: RecordParser
    splits: Mapping[str, str] = field(default_factory=dict)
    subset: str | None = None
    max_rows: int | None = None
    on_error: str = "stop"

    def read(
        self, path: str, split: str, record_types: Sequence[type[Record]], cache: DataCache | None = None
    ) -> "Records":
        """Read one split.

        Args:
            path: A file, or the ID of a Hub dataset.
            split: ``train``, ``val`` or ``test``; only used for a Hub dataset.
            record_types: The record types to try. The first one that fits the first row is used for all rows.
            cache: Where the result of parsing all rows is stored for the next time.

        Raises:
            DataError: The data cannot be read, a row is invalid and ``on_error`` is ``stop``, or no row is valid.
        """
        rows = self.rows(path, split)
        count = len(rows) if self.max_rows is None else min(self.max_rows, len(rows))
        names = {record_type.__name__: record_type for record_type in record_types}
        if cache is None or count < CACHED_ROWS:
            summary = self._parse_all(path, rows, count, record_types)
        else:
            parser = self.parser.columns, self.parser.all_learned
            key = path, content_key(path, rows), count, parser, self.on_error, list(names)
            summary = cache.summary(key, lambda: self._parse_all(path, rows, count, record_types))
        if names[summary["type"]] is UnpairedPreference:
            _check_classes(path, rows, self.parser.column("label"))
        report_records(path, count, summary)
        invalid = set(summary["invalid"])
        valid = range(count) if not invalid else [index for index in range(count) if index not in invalid]
        return Records(path, rows, self.parser, names[summary["type"]], valid, summary["has_margins"])

    def rows(self, path: str, split: str) -> Sequence[Row]:
        """Read the rows of one split as they are. With ``splits``, a directory is read like a Hub dataset.

        Raises:
            DataError: The data cannot be read, or they are a directory and there are no ``splits``.
        """
        if not self.splits:
            refuse_directory(path)
        return read_rows(path, split=self.splits.get(split, split), subset=self.subset, columns=self.parser.columns)

    def _parse_all(
        self, path: str, rows: Sequence[Row], count: int, record_types: Sequence[type[Record]]
    ) -> dict[str, Any]:
        """Parse every row once, and return what is known then."""
        errors: list[tuple[int, RecordError]] = []
        record_type: type[Record] | None = None
        empty: list[int] = []
        has_margins = False
        system: tuple[str, str] | None = None
        quiet = count < PROGRESS_BAR_ROWS
        for index in track(range(count), f"reading {escape(str(path))}", transient=True, disable=quiet):
            try:
                row = _row(path, rows, index)
                record_type = record_type or self._detect(row, record_types)
                record = self.parser.parse(row, record_type)
            except RecordError as error:
                errors.append((index, error))
                continue
            column = self.parser.system_column(row) if system is None else None
            if column is not None and row[column] == prompt_of(record).messages[0]["content"]:
                system = column, row[column]
            if isinstance(record, Preference):
                has_margins = has_margins or bool(record.margin)
                empty += [] if record.chosen.strip() and record.rejected.strip() else [index]
        record_type = record_type or record_types[0]
        first_error = self._report(path, rows, count, errors, record_type) if errors else None
        if len(errors) == count:
            raise DataError(f"{path}: the data contain no valid record.", f"Expected: {EXPECTED[record_type]}")
        return {
            "type": record_type.__name__,
            "invalid": [index for index, _ in errors],
            "error": first_error,
            "empty": len(empty),
            "first_empty": empty[0] if empty else None,
            "has_margins": has_margins,
            "system": system,
        }

    def _detect(self, row: Row, record_types: Sequence[type[Record]]) -> type[Record]:
        """Return the first type that fits a row; if there is none, that of its fields, or else the first one."""
        fitting = next((each for each in record_types if parses(self.parser, row, each)), None)
        form = fitting or form_of(self.parser, row)
        return form if form in record_types else record_types[0]

    def _report(
        self,
        path: str,
        rows: Sequence[Row],
        count: int,
        errors: Sequence[tuple[int, RecordError]],
        record_type: type[Record],
    ) -> str:
        """Return the first error, or raise an error that shows the first ones and how to fix them."""
        shown = [f"{location(path, index)}: {error}." for index, error in errors[:MAX_SHOWN_ERRORS]]
        if self.on_error == "skip":
            return shown[0]
        if len(errors) > MAX_SHOWN_ERRORS:
            shown.append(f"... and {len(errors) - MAX_SHOWN_ERRORS} more of {count} rows.")
        index, first = errors[0]
        fixes = [] if first.fix is None else [first.fix]
        if first.missing:
            fixes += hints(self.parser, rows[index], record_type, first, mixed=len(errors) < count)
        fixes += [f"Expected: {EXPECTED[record_type]}", "To skip invalid rows: data.on_error=skip"]
        raise DataError("\n".join(shown), "\n  ".join(fixes))


class Records(LazySequence[Any]):
    """Records of a split. A record is parsed when it is accessed, so memory does not depend on their length.

    Args:
        path: The file or the ID of the Hub dataset.
        rows: Its rows.
        parser: Turns rows into records.
        record_type: The type of the records.
        indices: Index of the row of each record.
        has_margins: Whether a preference pair of the data has a margin.
    """

    def __init__(
        self,
        path: str,
        rows: Sequence[Row],
        parser: RecordParser,
        record_type: type[Record],
        indices: Sequence[int],
        has_margins: bool = False,
    ) -> None:
        self.path, self.record_type, self.has_margins = path, record_type, has_margins
        self._rows, self._parser = rows, parser
        self._indices = indices if isinstance(indices, range) else array("Q", indices)

    def __len__(self) -> int:
        return len(self._indices)

    def item(self, index: int) -> Any:
        number = self._indices[index]
        record = self._parser.parse(_row(self.path, self._rows, number), self.record_type)
        prompt_of(record).row = number
        return record

    @property
    def key(self) -> Any:
        """What identifies the content of the records, as JSON."""
        indices = self._indices if isinstance(self._indices, range) else sha256(self._indices.tobytes()).hexdigest()
        return content_key(self.path, self._rows), self.record_type.__name__, self._parser.columns, str(indices)

    def existing_columns(self, names: Collection[str]) -> set[str]:
        """Return those of some columns that at least one row of the data has; all of them with ``EVERY_COLUMN``."""
        columns: Collection[str] | None = getattr(self._rows, "column_names", None)  # of ``datasets``
        found = set(columns or ())
        for index in range(len(self._rows) if columns is None else 0):
            if found.issuperset(names):
                break
            with suppress(RecordError):  # of an invalid row
                found |= self._rows[index].keys()
        return found if EVERY_COLUMN in names else found & set(names)

    def first_row(self) -> Row:
        """Return the first row."""
        return _row(self.path, self._rows, self._indices[0])

    def values(self, row: int, columns: Collection[str]) -> dict[str, Any]:
        """Return what a row contains in some columns; None where it has no value."""
        content = _row(self.path, self._rows, row)
        return {name: content.get(name) for name in columns}

    def select(self, indices: Sequence[int]) -> "Records":
        """Return the records of some indices."""
        chosen = [self._indices[index] for index in indices]
        return Records(self.path, self._rows, self._parser, self.record_type, chosen, self.has_margins)


def _check_classes(path: str, rows: Any, column: str) -> None:
    """Raise an error if the labels of a Hub dataset have classes whose names mean the opposite, and warn about others
    whose names do not clearly mean false and true.
    """
    names = getattr((getattr(rows, "features", None) or {}).get(column), "names", None)  # of a ``ClassLabel``
    if names is None:
        return
    meanings = [CLASSES.get(re.sub("[ -]", "_", name.strip().lower())) for name in names]
    classes = " and ".join(f"{value} = {name!r}" for value, name in enumerate(names))
    if meanings == [True, False]:
        raise DataError(
            f"{path}: the field '{column}' has the classes {classes}, but 0 must mean undesirable and 1 desirable.",
            f"Store a copy of the data in which '{column}' is true or false.",
        )
    if meanings != [False, True]:
        log.warning(
            "%s: the field '%s' has the classes %s. 0 is read as undesirable, 1 as desirable.", path, column, classes
        )


def _row(path: str, rows: Sequence[Row], index: int) -> Row:
    try:
        return rows[index]
    except RecordError:
        raise
    except Exception as error:  # ``datasets`` raises several types for field names that it does not support.
        raise DataError(f"{location(path, index)}: the row cannot be read ({error}).") from error


def hold_out(records: Sequence[Any], fraction: float, seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Split records at random into those to train on and those held out for validation, both in their old order.

    Args:
        records: At least one record.
        fraction: Fraction to hold out. At least one record is kept for training.
        seed: Seed of the choice. It does not use or change the global random state.
    """
    count = min(int(len(records) * fraction + 0.5), len(records) - 1)
    held_out = sorted(random.Random(seed).sample(range(len(records)), count))
    chosen = set(held_out)
    kept = [index for index in range(len(records)) if index not in chosen]
    return select(records, kept), select(records, held_out)


def select(records: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    """Return the records of some indices."""
    return records.select(indices) if isinstance(records, Records) else [records[index] for index in indices]
