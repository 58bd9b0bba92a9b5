"""The arguments and results of operations: tensors, numbers and other values, in tuples, lists and dictionaries.

``torch.utils._pytree`` does the same for any container, and takes most of the time of an operation on tiny tensors.
"""

from collections.abc import Callable
from typing import Any


def map_values(function: Callable[[Any], Any], nested: Any) -> Any:
    """Return the same containers with the results of a function in place of the values."""
    if isinstance(nested, tuple | list):
        return type(nested)([map_values(function, value) for value in nested])
    if isinstance(nested, dict):
        return {name: map_values(function, value) for name, value in nested.items()}
    return function(nested)


def values_of(nested: Any) -> list[Any]:
    """Return the values in order."""
    found: list[Any] = []
    map_values(found.append, nested)
    return found
