"""Writing encoded rows to an Arrow file, and opening it memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.row_columns import flatten, leaves
from rlhf.data.rows import BATCH_ROWS, LENGTH, NUMBER, RowTable
from rlhf.files import PART, replace_part

if TYPE_CHECKING:
    import pyarrow as pa


class RowWriter:
    """Collects rows as record batches, in memory or in a file. The file appears when ``finish`` is called.

    Args:
        row_type: The dataclass of the rows, see ``rlhf.data.row_columns.leaves``.
        path: The file; None to keep the record batches in memory.
    """

    def __init__(self, row_type: type, path: Path | None = None) -> None:
        import pyarrow as pa

        columns = [*leaves(row_type), (LENGTH, pa.int64()), (NUMBER, pa.int64())]
        self._type, self._schema, self._path = row_type, pa.schema(columns), path
        self._pending: list[dict[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []
        self._resources = ExitStack()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._part = path.with_name(path.name + PART)
            sink = self._resources.enter_context(pa.OSFile(str(self._part), "wb"))
            self._writer = self._resources.enter_context(pa.ipc.new_file(sink, self._schema))

    def add(self, row: Any, length: int, number: int) -> None:
        """Add a row.

        Args:
            row: The row.
            length: Its length in tokens.
            number: Where it is in the data, from 0; -1 if that is not known.

        Raises:
            TypeError: Its type differs from that of the rows before.
        """
        if type(row) is not self._type:
            raise TypeError(f"rows must have one type, got {self._type.__name__} and {type(row).__name__}")
        self._pending.append({**flatten(row), LENGTH: length, NUMBER: number})
        if len(self._pending) == BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        batch = pa.RecordBatch.from_pylist(self._pending, schema=self._schema)
        self._pending = []
        if self._path is None:
            self._batches.append(batch)
        else:
            self._writer.write_batch(batch)

    def finish(self) -> RowTable:
        """Return all rows."""
        if self._pending:
            self._flush()
        self._resources.close()
        if self._path is None:
            return RowTable(self._type, self._batches)
        replace_part(self._part, self._path)
        return open_rows(self._type, self._path)

    def discard(self) -> None:
        """Delete what has been written, after a failure."""
        with suppress(OSError):  # Closing the file writes its end, which a full disk does not take either.
            self._resources.close()
        if self._path is not None:
            self._part.unlink(missing_ok=True)


def open_rows(row_type: type, path: Path) -> RowTable:
    """Open a file of rows. Memory holds the parts of the file that are in use.

    Raises:
        ValueError: The file does not contain rows of this type.
        OSError: It cannot be read.
    """
    import pyarrow as pa

    reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
    names: Sequence[str] = [name for name, _ in leaves(row_type)]
    if reader.schema.names != [*names, LENGTH, NUMBER]:
        raise ValueError(f"{path}: expected the columns {names}, got {reader.schema.names}")
    return RowTable(row_type, [reader.get_batch(i) for i in range(reader.num_record_batches)])
