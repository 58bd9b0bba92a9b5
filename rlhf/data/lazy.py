"""Sequences whose items are made when they are accessed."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar, overload

T = TypeVar("T")


class LazySequence(Sequence[T]):
    """A sequence whose items are made when they are accessed. Slices are lists."""

    @abstractmethod
    def item(self, index: int) -> T:
        """Make the item of an index from 0 to the length minus 1."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.item(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} items")
        return self.item(index % len(self))
