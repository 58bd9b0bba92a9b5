"""Constructor arguments of a module: their check, and those that checkpoints store as hyperparameters."""

import inspect
from collections.abc import Sequence
from types import FrameType
from typing import Any

from rlhf.schema import check_arguments

PLAIN = (bool, int, float, str, type(None))  # Types that checkpoints can hold without pickle.


def constructor_calls(frame: FrameType | None) -> list[tuple[type, dict[str, Any]]]:
    """Return the classes of a module whose constructors are running, and their arguments, from the subclass up.

    Args:
        frame: Frame of the ``__init__`` of the base class.
    """
    assert frame is not None, "this Python implementation has no stack frames"
    module = frame.f_locals["self"]
    calls: list[tuple[type, dict[str, Any]]] = []
    while frame and frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is module:
        names, _, keywords, values = inspect.getargvalues(frame)
        if "__class__" in values:
            arguments = {name: values[name] for name in names if name in values and name != "self"}
            calls.insert(0, (values["__class__"], arguments | values.get(keywords or "", {})))
        frame = frame.f_back
    return calls


def check_constructors(calls: Sequence[tuple[type, dict[str, Any]]]) -> None:
    """Raise a ``ConfigError`` for an argument of a stage that the signature of its class does not allow."""
    for cls, arguments in calls:
        check_arguments(cls, "stage", arguments)


def plain_arguments(calls: Sequence[tuple[type, dict[str, Any]]]) -> dict[str, Any]:
    """Return the arguments that are numbers, strings, booleans, None, or sequences of these.

    Models, functions and settings objects are left out: a checkpoint that contained them could not be opened with
    ``torch.load(weights_only=True)``. If several classes have an argument, the value is that of the subclass.
    """
    plain: dict[str, Any] = {}
    for _, arguments in reversed(calls):
        for name, value in arguments.items():
            if isinstance(value, Sequence) and not isinstance(value, str):
                value = list(value)  # From Hydra, it is a ListConfig, which would be pickled.
            if all(isinstance(item, PLAIN) for item in (value if isinstance(value, list) else [value])):
                plain[name] = value
    return plain
