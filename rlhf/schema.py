"""Ranges in signatures: the annotation of a keyword declares which values its configuration key may have.

A range is written as text in ``typing.Annotated``, so that declaring one needs no import but this::

    label_smoothing: Annotated[float, ">= 0", "< 0.5"] = 0.0

Text that is not a bound names the values and their placeholder: ``Annotated[str, "a function", "<file.py>:<name>"]``.
``accepts`` checks a value, and ``describe`` puts the range into words. ``rlhf.config`` applies both to every key of a
configuration, and ``check_arguments`` to the arguments of a call in Python.
"""

import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

from rlhf.errors import ConfigError

PositiveInt: TypeAlias = Annotated[int, ">= 1"]
NonNegativeInt: TypeAlias = Annotated[int, ">= 0"]
PositiveFloat: TypeAlias = Annotated[float, "> 0"]
NonNegativeFloat: TypeAlias = Annotated[float, ">= 0"]
Fraction: TypeAlias = Annotated[float, ">= 0", "<= 1"]
FractionBelowOne: TypeAlias = Annotated[float, ">= 0", "< 1"]
Port: TypeAlias = Annotated[int, ">= 0", "<= 65535"]
Seed: TypeAlias = Annotated[int, ">= 0", "<= 4294967295"]  # what NumPy accepts
DataPath: TypeAlias = Annotated[str, "one path or Hub dataset ID", "<file>"]
ScorerPath: TypeAlias = Annotated[str, "a function", "<file.py>:<function>"]

# An operator, what it checks, and how it is read.
BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    ">=": (operator.ge, "at least"),
    ">": (operator.gt, "above"),
    "<=": (operator.le, "at most"),
    "<": (operator.lt, "below"),
}
NOUNS = {
    bool: ("true or false", "true or false"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
}
VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def declared_keywords(target: Any) -> tuple[dict[str, Parameter], bool]:
    """Return the keywords of a function or a class, and whether it also accepts keywords that it does not declare.

    ``**keywords`` of a class stand for the keywords of its base class.
    """
    functions = [target]
    if isinstance(target, type):
        functions = [vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls) and cls is not object]
    found: dict[str, Parameter] = {}
    for function in functions:
        parameters = list(signature(function).parameters.values())
        for parameter in parameters[1:] if isinstance(target, type) else parameters:
            found.setdefault(parameter.name, parameter)
        if all(parameter.kind is not Parameter.VAR_KEYWORD for parameter in parameters):
            return {name: p for name, p in found.items() if p.kind not in VARIADIC}, False
    is_closed = isinstance(target, type) and target.__module__.startswith("rlhf.")
    return {name: p for name, p in found.items() if p.kind not in VARIADIC}, not is_closed


def has_default(target: Any, name: str, value: Any) -> bool:
    """Return whether a value is the default of a keyword in the signature of a function or a class."""
    return bool(value == declared_keywords(target)[0][name].default)


def check_arguments(target: Any, path: str, arguments: Mapping[str, Any]) -> None:
    """Raise the error of ``rlhf.config`` for an argument that the signature of a function or class does not allow.

    Args:
        target: The function or class.
        path: The configuration node of the arguments, such as ``stage.sampling``; empty for none.
        arguments: Arguments by keyword. Others than the keywords of the signature are ignored, as those in
            ``locals()``.

    Raises:
        ConfigError: The message names the key, the value, the constraint and the fix.
    """
    keywords, _ = declared_keywords(target)
    for name, value in arguments.items():
        if name in keywords and not accepts(keywords[name].annotation, value):
            key = f"{path}.{name}" if path else name
            raise out_of_range(key, value, keywords[name].annotation, keywords[name].default)


def accepts(annotation: Any, value: Any) -> bool:
    """Return whether an annotation allows a value. An unknown annotation allows every value.

    Numbers of NumPy and PyTorch count as numbers, and paths as text.
    """
    if not is_known(annotation):
        return True
    plain = os.fspath(value) if isinstance(value, os.PathLike) else value
    plain = plain.item() if getattr(plain, "ndim", None) == 0 else plain
    return any(_accepts_one(option, plain) for option in _options(annotation))


def is_known(annotation: Any) -> bool:
    """Return whether ``accepts`` can check values of an annotation: it consists of plain types."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return is_known(arguments[0])
    if origin in (Union, UnionType, tuple, Sequence, Mapping):
        return all(is_known(argument) for argument in arguments)
    return origin is Literal or annotation in (bool, int, float, str, None, NoneType)


def describe(annotation: Any) -> str:
    """Put the values that an annotation allows into words, such as ``an integer of at least 1 or null``."""
    words = [word for option in _options(annotation) for word in _describe_option(option)]
    *others, last = words
    if not others:
        return last
    needs_comma = len(others) > 1 or " or " in others[0]
    return f"{', '.join(others)}{',' if needs_comma else ''} or {last}"


def out_of_range(key: str, value: Any, annotation: Any, example: Any = None) -> ConfigError:
    """Return the error for a value that an annotation does not allow.

    Args:
        key: Configuration key.
        value: The value.
        annotation: What the key allows.
        example: A value to suggest, such as the default. If the key does not allow it, a placeholder stands for it.
    """
    shown = f"'{value}'" if isinstance(value, str) else to_text(value)
    has_example = example is not None and is_known(annotation) and accepts(annotation, example)
    fix = to_text(example) if has_example else placeholder(annotation)
    return ConfigError(f"{key} must be {describe(annotation)}, got {shown}.", f"Set {key}={fix}.")


def placeholder(annotation: Any) -> str:
    """Return what stands for a value of an annotation in a command, such as ``<integer>``."""
    option = next(option for option in _options(annotation) if option is not NoneType)
    kind, arguments = _plain(option), get_args(option)
    if named := [text for text in _texts(option) if text.startswith("<") and text.endswith(">")]:
        return named[0]
    if get_origin(option) is Literal:
        return to_text(arguments[0])
    if get_origin(option) in (tuple, Sequence):
        count = len(arguments) if get_origin(option) is tuple else 1
        return f"[{','.join([placeholder(arguments[0])] * count)}]"
    if get_origin(option) is Mapping:
        return f"{{<name>: {placeholder(arguments[1])}}}"
    return {bool: "true", int: "<integer>", float: "<number>"}.get(kind, "<text>")


def to_text(value: Any) -> str:
    """Return a value as it is typed in a command."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {to_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, Sequence):
        return f"[{','.join(map(to_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _options(annotation: Any) -> list[Any]:
    """Return the members of a union, with null last; other annotations are their own only member."""
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    return sorted(get_args(annotation), key=lambda option: option is NoneType)


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _texts(annotation: Any) -> tuple[str, ...]:
    """Return what is written in ``Annotated``."""
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def _bounds(annotation: Any) -> list[tuple[str, float]]:
    """Return the operator and the limit of each bound in ``Annotated``."""
    words = [text.split() for text in _texts(annotation)]
    return [(word[0], float(word[1])) for word in words if word[0] in BOUNDS]


def _accepts_one(option: Any, value: Any) -> bool:
    kind, arguments = _plain(option), get_args(option)
    if get_origin(option) is Literal:
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in arguments)
    if get_origin(option) in (tuple, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        items = arguments if get_origin(option) is tuple else arguments * len(value)
        return len(items) == len(value) and all(map(accepts, items, value))
    if get_origin(option) is Mapping:
        return isinstance(value, Mapping) and all(accepts(arguments[1], item) for item in value.values())
    if kind in (None, NoneType):
        return value is None
    if kind in (int, float):
        is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and _is_in_bounds(option, value)
    return isinstance(value, kind)


def _is_in_bounds(option: Any, value: float) -> bool:
    return all(BOUNDS[sign][0](value, limit) for sign, limit in _bounds(option))


def _describe_option(option: Any, *, plural: bool = False) -> list[str]:
    """Return one member of a union in words; each value of a ``Literal`` is a separate word."""
    arguments, bounds = get_args(option), _bounds(option)
    if get_origin(option) is Literal:
        return [to_text(argument) for argument in arguments]
    if get_origin(option) in (tuple, Sequence):
        count = f"{len(arguments)} " if get_origin(option) is tuple else ""
        return [f"a list of {count}{_describe_option(arguments[0], plural=True)[0]}"]
    if get_origin(option) is Mapping:
        return [f"a mapping of names to {_describe_option(_options(arguments[1])[0], plural=True)[0]}"]
    if named := [text for text in _texts(option) if text[0] not in "<>"]:
        return [named[0]]
    limits = " and ".join(f"{BOUNDS[sign][1]} {limit:g}" for sign, limit in bounds)
    if [sign for sign, _ in bounds] == [">=", "<="]:
        limits = f"from {bounds[0][1]:.10g} to {bounds[1][1]:.10g}"
    elif limits.startswith("at"):
        limits = f"of {limits}"
    return [f"{NOUNS.get(_plain(option), ('null', 'null'))[plural]} {limits}".strip()]
