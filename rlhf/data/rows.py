"""Encoded rows of a split: as Python objects, or as columns of Arrow that take 4 bytes per token."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.data.lazy import LazySequence
from rlhf.data.row_columns import ColumnReader, as_array, leaves, unflatten

if TYPE_CHECKING:
    import pyarrow as pa

LENGTH, NUMBER = "length", "row"  # columns of a table in addition to the fields of its rows
BATCH_ROWS = 4096  # rows of each record batch of a table but the last one


class Rows(LazySequence[Any]):
    """The encoded rows of a split.

    Attributes:
        lengths: [rows] length of each row in tokens, by which batches are bucketed.
        numbers: [rows] where each row is in the data, from 0; -1 if that is not known.
    """

    lengths: np.ndarray
    numbers: np.ndarray

    @abstractmethod
    def value(self, index: int, name: str) -> Any:
        """Return one field of a row. Fields that ``extend`` sets are not computed for it."""

    @abstractmethod
    def column(self, name: str) -> Iterable[Any]:
        """Return the value of a field for each row."""

    @abstractmethod
    def extend(self, name: str, value: Callable[[int], Any], content: Iterable[Any] = ()) -> None:
        """Set a field of every row that is not known when the rows are encoded.

        Args:
            name: The field.
            value: Returns its value for the row of an index.
            content: Buffers that determine the values, if ``content`` has to contain them.
        """

    @abstractmethod
    def content(self) -> Iterator[Any]:
        """Yield buffers that determine the rows, to compute a hash of them."""


class RowList(Rows):
    """Rows as Python objects of any type."""

    def __init__(self, rows: list[Any], lengths: Sequence[int] = (), numbers: Sequence[int] = ()) -> None:
        self._rows = rows
        self.lengths, self.numbers = np.asarray(lengths, dtype=np.int64), np.asarray(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int) -> Any:
        return self._rows[index]

    def value(self, index: int, name: str) -> Any:
        return getattr(self._rows[index], name)

    def column(self, name: str) -> Iterable[Any]:
        return [getattr(row, name) for row in self._rows]

    def extend(self, name: str, value: Callable[[int], Any], content: Iterable[Any] = ()) -> None:
        for index, row in enumerate(self._rows):
            setattr(row, name, value(index))

    def content(self) -> Iterator[Any]:
        for row in self._rows:
            for response in row.responses:
                yield array("q", [len(response.input_ids), response.start, *response.input_ids])


class RowTable(Rows):
    """Rows as columns of Arrow, in memory or memory-mapped. A row is made when it is accessed.

    Args:
        row_type: The dataclass of the rows, see ``rlhf.data.row_columns.leaves``.
        batches: Record batches of ``BATCH_ROWS`` rows each; the last one may have fewer.
    """

    def __init__(self, row_type: type, batches: Sequence[pa.RecordBatch]) -> None:
        self._type, self._batches = row_type, batches
        self._names = [name for name, _ in leaves(row_type)]
        self._readers = [{name: ColumnReader(batch.column(name)) for name in self._names} for batch in batches]
        self._extensions: dict[str, Callable[[int], Any]] = {}
        self._content: dict[str, list[Any]] = {}  # what determines them
        self.lengths, self.numbers = (self._numeric(name) for name in (LENGTH, NUMBER))

    def _numeric(self, name: str) -> np.ndarray:
        parts = [as_array(batch.column(name)) for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def item(self, index: int) -> Any:
        row = self._stored(index)
        for name, value in self._extensions.items():
            setattr(row, name, value(index))
        return row

    def _stored(self, index: int) -> Any:
        readers, row = self._readers[index // BATCH_ROWS], index % BATCH_ROWS
        return unflatten(self._type, {name: reader.read(row) for name, reader in readers.items()})

    def value(self, index: int, name: str) -> Any:
        return getattr(self._stored(index), name)

    def column(self, name: str) -> Iterable[Any]:
        for batch in self._batches:
            yield from batch.column(name).to_pylist()

    def extend(self, name: str, value: Callable[[int], Any], content: Iterable[Any] = ()) -> None:
        self._extensions[name] = value
        self._content[name] = list(content)

    def content(self) -> Iterator[Any]:
        for batch in self._batches:
            for name in self._names:
                yield from (buffer for buffer in batch.column(name).buffers() if buffer is not None)
        for buffers in self._content.values():
            yield from buffers
