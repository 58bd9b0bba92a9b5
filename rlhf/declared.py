"""Call an extension function with the arguments that its signature declares."""

from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature
from typing import Any

from torch import nn

from rlhf.errors import ConfigError


def unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of a ``functools.partial``, and any other function unchanged."""
    return function.func if isinstance(function, partial) else function


def declared_arguments(function: Callable[..., Any]) -> set[str]:
    """Return the names of the arguments that a function declares and that are not bound yet.

    Args:
        function: A function, a ``functools.partial`` of one, or an ``nn.Module``, whose ``forward`` is inspected.
    """
    bound = function.keywords.keys() if isinstance(function, partial) else set()
    return set(_parameters(function)) - bound


def call_declared(function: Callable[..., Any], **available: Any) -> Any:
    """Call a function with those of the available arguments that its signature declares.

    Args:
        function: See ``declared_arguments``.
        available: Every argument that the caller can provide, by name.

    Raises:
        ConfigError: The function requires an argument that is not available.
    """
    declared = declared_arguments(function)
    for name in declared - available.keys():
        parameter = _parameters(function)[name]
        if parameter.default is Parameter.empty and parameter.kind is not Parameter.VAR_KEYWORD:
            raise ConfigError(
                f"{_qualified_name(function)} requires the argument '{name}', which is not available here.",
                f"Available arguments: {', '.join(sorted(available))}.",
            )
    return function(**{name: value for name, value in available.items() if name in declared})


def _parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    return dict(signature(function.forward if isinstance(function, nn.Module) else function).parameters)


def _qualified_name(function: Callable[..., Any]) -> str:
    inner = unwrapped(function)
    return str(getattr(inner, "__qualname__", type(inner).__qualname__))
