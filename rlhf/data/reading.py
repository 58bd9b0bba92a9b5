"""Read the records of a file or a Hub dataset, and report the rows that are not valid records."""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.files import location, read_rows
from rlhf.data.parser import RecordError, RecordParser
from rlhf.data.records import EXPECTED, Preference, Record, Row, prompt_of
from rlhf.errors import DataError

log = logging.getLogger(__name__)
MAX_SHOWN_ERRORS = 5
COMMON_FIELDS = ("prompt", "document", "target", "chosen", "rejected")


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

    def read(self, path: str, split: str, record_types: Sequence[type[Record]]) -> list[Any]:
        """Read one split.

        Args:
            path: A file, or the ID of a Hub dataset.
            split: ``train``, ``val`` or ``test``; only used for a Hub dataset.
            record_types: The record types to try. The first one that fits the first row is used for all rows.

        Raises:
            DataError: The data cannot be read, a row is invalid and ``on_error`` is ``stop``, or no row is valid.
        """
        rows = read_rows(path, split=self.splits.get(split, split), subset=self.subset)
        count = len(rows) if self.max_rows is None else min(self.max_rows, len(rows))
        records: list[Any] = []
        errors: list[tuple[int, RecordError]] = []
        record_type: type[Record] | None = None
        for index in range(count):
            try:
                row = _row(path, rows, index)
                record_type = record_type or self._detect(row, record_types)
                records.append(self.parser.parse(row, record_type))
                prompt_of(records[-1]).row = index
            except RecordError as error:
                errors.append((index, error))
        record_type = record_type or record_types[0]
        if errors:
            self._report(path, rows, errors, record_type)
        _warn_about_empty_responses(path, records)
        if not records:
            raise DataError(f"{path}: the data contain no valid record.", f"Expected: {EXPECTED[record_type]}")
        log.info("%s: read %d records, skipped %d invalid rows", path, len(records), len(errors))
        return records

    def _detect(self, row: Row, record_types: Sequence[type[Record]]) -> type[Record]:
        """Return the first type that fits a row; if there is none, the first one of which no field is missing."""
        complete = []
        for record_type in record_types:
            try:
                self.parser.parse(row, record_type)
                return record_type
            except RecordError as error:
                complete += [record_type] if error.missing is None else []
        return [*complete, record_types[0]][0]

    def _report(
        self, path: str, rows: Sequence[Row], errors: Sequence[tuple[int, RecordError]], record_type: type[Record]
    ) -> None:
        """Log the invalid rows, or raise an error that shows the first ones and how to fix them."""
        shown = [f"{location(path, index)}: {error}." for index, error in errors[:MAX_SHOWN_ERRORS]]
        if self.on_error == "skip":
            log.warning("%s: skipped %d invalid rows; the first one: %s", path, len(errors), shown[0])
            return
        if len(errors) > MAX_SHOWN_ERRORS:
            shown.append(f"... and {len(errors) - MAX_SHOWN_ERRORS} more of {len(rows)} rows.")
        index, first = errors[0]
        fixes = [] if first.fix is None else [first.fix]
        if first.missing:
            name, column = first.missing, _likely_column(rows[index])
            name = "messages" if column == "conversations" else name
            fixes.append(f"If the field has another name: data.columns.{name}={column}")
        fixes += [f"Expected: {EXPECTED[record_type]}", "To skip invalid rows: data.on_error=skip"]
        raise DataError("\n".join(shown), "\n  ".join(fixes))


def _row(path: str, rows: Sequence[Row], index: int) -> Row:
    try:
        return rows[index]
    except RecordError:
        raise
    except Exception as error:  # ``datasets`` raises several types for field names that it does not support.
        raise DataError(f"{location(path, index)}: the row cannot be read ({error}).") from error


def _warn_about_empty_responses(path: str, records: Sequence[Any]) -> None:
    empty = [
        record
        for record in records
        if isinstance(record, Preference) and not (record.chosen.strip() and record.rejected.strip())
    ]
    if empty and (row := empty[0].prompt.row) is not None:
        log.warning(
            "%s: %d of %d records have an empty chosen or rejected response; the first one: %s",
            path,
            len(empty),
            len(records),
            location(path, row),
        )


def _likely_column(row: Row) -> str:
    """Guess which column contains a missing field: the last one that is no field of a pair or demonstration."""
    candidates = [name for name, value in row.items() if value is not None and name not in COMMON_FIELDS]
    return candidates[-1] if candidates else "<name>"


def hold_out(records: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Split records at random into those to train on and those held out for validation, both in their old order.

    Args:
        records: At least one record.
        fraction: Fraction to hold out. At least one record is kept for training.
        seed: Seed of the choice. It does not use or change the global random state.
    """
    count = min(int(len(records) * fraction + 0.5), len(records) - 1)
    chosen = set(random.Random(seed).sample(range(len(records)), count))
    kept = [record for index, record in enumerate(records) if index not in chosen]
    return kept, [record for index, record in enumerate(records) if index in chosen]
