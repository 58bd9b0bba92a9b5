"""Columns of Arrow for the dataclasses of encoded rows.

A field that is a dataclass itself becomes one column for each of its fields, with a dotted name such as
``chosen.input_ids``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

NOT_STORED = {"stored": False}  # metadata of a field that ``Rows.extend`` sets


def leaves(row_type: Any) -> tuple[tuple[str, pa.DataType], ...]:
    """Return the columns of a dataclass: name and type.

    Raises:
        TypeError: It is not a dataclass, or a field has a type that is not supported. These are int, float, bool, str,
            lists of token ids, messages of a conversation, dataclasses, and any of these or None.
    """
    if not is_dataclass(row_type):
        raise TypeError(f"{row_type} is not a dataclass")
    hints = get_type_hints(row_type)
    found: list[tuple[str, pa.DataType]] = []
    kind: Any = row_type
    for name, inner in _nested(kind):
        if inner is None:
            found.append((name, _arrow_type(hints[name])))
        else:
            found += [(f"{name}.{column}", arrow_type) for column, arrow_type in leaves(inner)]
    return tuple(found)


@cache
def _nested(row_type: Any) -> tuple[tuple[str, type | None], ...]:
    """Return the stored fields of a dataclass, each with its type if that is a dataclass."""
    hints = get_type_hints(row_type)
    names = [item.name for item in fields(row_type) if item.metadata.get("stored", True)]
    return tuple((name, hints[name] if is_dataclass(hints[name]) else None) for name in names)


def _arrow_type(hint: Any) -> pa.DataType:
    import pyarrow as pa  # Imported here because it takes 0.2 s, which small data do not need.

    if get_origin(hint) in (UnionType, Union):
        (hint,) = (option for option in get_args(hint) if option is not NoneType)
    if hint == list[int]:
        return pa.list_(pa.int32())
    if hint == Sequence[dict[str, str]]:
        return pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    simple = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string()}
    if hint not in simple:
        raise TypeError(f"{hint} has no column")
    return simple[hint]


def flatten(row: Any) -> dict[str, Any]:
    """Return the values of a row by the names of its columns."""
    return dict(_flattened(row, ""))


def _flattened(row: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    kind: Any = type(row)
    for name, inner in _nested(kind):
        value = getattr(row, name)
        if inner is None:
            yield prefix + name, value
        else:
            yield from _flattened(value, f"{prefix}{name}.")


def unflatten(row_type: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Make a row of the values of its columns."""
    return row_type(
        **{
            name: values[prefix + name] if inner is None else unflatten(inner, values, f"{prefix}{name}.")
            for name, inner in _nested(row_type)
        }
    )


def as_array(numbers: pa.Array) -> np.ndarray:
    """Return numbers without copying them. ``numbers.to_numpy()`` would import pandas, which takes 0.15 s."""
    return np.from_dlpack(numbers)


class ColumnReader:
    """Reads single values of a column. Token ids are read without an object of Arrow for each of them."""

    def __init__(self, column: pa.Array) -> None:
        import pyarrow as pa

        self._column = column
        self._values = self._offsets = None
        if column.type == pa.list_(pa.int32()):
            self._values, self._offsets = as_array(column.values), as_array(column.offsets)

    def read(self, index: int) -> Any:
        if self._values is None or self._offsets is None:
            return self._column[index].as_py()
        return self._values[self._offsets[index] : self._offsets[index + 1]].tolist()
