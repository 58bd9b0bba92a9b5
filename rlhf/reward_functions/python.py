"""Rewards from a Python function of the user."""

import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.reading import EVERY_COLUMN
from rlhf.errors import ConfigError, DataError
from rlhf.models import ModelSource
from rlhf.reward_functions.base import RewardFunction, ScoringBatch
from rlhf.schema import ScorerPath
from rlhf.tensors import upload

SHOWN = 60  # characters of a value or a response in an error message
POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL)


class PythonReward(RewardFunction):
    """Scores responses with a Python function.

    Args:
        path: The function, as ``file.py:function``. It receives the prompts, as in the data, and one response per
            prompt, and returns one finite number per response, in reward units. If it takes a third argument, it also
            receives the reference responses of the data (None where there is none). A keyword-only parameter receives
            the column of the data that has its name, as a list with one value per response (None where a row has none).
            The data must have that column, unless the parameter has a default. ``**kwargs`` receives all other columns
            whose names are not those of parameters.
    """

    def __init__(self, *, path: ScorerPath | None = None) -> None:
        super().__init__()
        self.path = path

    def load(self, sources: Sequence[ModelSource], tokenizer: PreTrainedTokenizerBase) -> None:
        if self.path is None:
            raise ConfigError(
                "reward=python requires reward.path, the function that scores responses.",
                "Set reward.path=<file.py>:<function>.",
            )
        _ = self.function  # An error in its file is reported before training.

    @cached_property
    def function(self) -> "Scorer":
        """The function. A file is imported once."""
        assert self.path is not None
        # Training checks the scores of all reward functions itself: stage.on_nonfinite decides what happens.
        return load_scorer(self.path, key="reward.path", finite=False)

    @property
    def columns(self) -> Mapping[str, bool]:  # type: ignore[override]
        return self.function.columns if self.path is not None else {}

    def forward(self, batch: ScoringBatch) -> Tensor:
        scores = self.function(batch.prompts, batch.responses, batch.targets, batch.columns)
        return upload(torch.tensor(scores, dtype=torch.float), batch.input_ids.device)


@dataclass(frozen=True)
class Scorer:
    """A scoring function whose scores are checked.

    Args:
        function: The function, described in ``PythonReward``.
        name: Key and value of the configuration that name it, for error messages.
        takes_targets: Whether it takes a third argument.
        columns: The columns of the data that it receives, each with whether it is required: its keyword-only
            parameters, and ``EVERY_COLUMN`` if it has a parameter such as ``**kwargs``.
        positional: Names of its other parameters, which cannot be passed by keyword as well.
        finite: Reject scores that are not finite.
    """

    function: Callable[..., Any]
    name: str
    takes_targets: bool
    columns: Mapping[str, bool]
    positional: frozenset[str]
    finite: bool

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        targets: Sequence[str | None],
        columns: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    ) -> list[float]:
        """Return one score per response, in reward units.

        Raises:
            DataError: The function has returned something else.
        """
        arguments: list[Any] = [list(prompts), list(responses), list(targets)]
        values = {name: list(column) for name, column in columns.items() if self._receives(name)}
        result = self.function(*(arguments if self.takes_targets else arguments[:2]), **values)
        scores = _numbers(result, responses, self.name)
        if len(scores) != len(responses):
            raise DataError(f"{self.name} returned {len(scores)} scores for {len(responses)} responses.")
        for score, response in zip(scores, responses, strict=True):
            if self.finite and not math.isfinite(score):
                raise DataError(f"{self.name} returned the non-finite score {score} for the response {response!r}.")
        return scores

    def _receives(self, column: str) -> bool:
        return column in self.columns or (EVERY_COLUMN in self.columns and column not in self.positional)


def load_scorer(name: str, *, key: str, finite: bool = True) -> Scorer:
    """Load a scoring function.

    Args:
        name: The function, as ``file.py:function``; its arguments are described in ``PythonReward``.
        key: Configuration key that contains ``name``, for error messages.
        finite: Reject scores that are not finite.

    Raises:
        ConfigError: There is no such file or function, or it cannot be called with these arguments.
    """
    function = _import_function(name, key)
    parameters = signature(function).parameters.values()
    takes_targets = sum(parameter.kind in POSITIONAL for parameter in parameters) > 2
    positional = frozenset(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
    columns = {each.name: each.default is Parameter.empty for each in parameters if each.kind is each.KEYWORD_ONLY}
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        columns[EVERY_COLUMN] = False
    try:
        signature(function).bind(*range(3 if takes_targets else 2), **columns)
    except TypeError as error:
        raise ConfigError(
            f"{key}={name}: the function must have two parameters, the prompts and the responses ({error}).",
            "Define it as def score(prompts, responses). Parameters that receive columns of the data follow a *: "
            "def score(prompts, responses, *, <column>)",
        ) from error
    return Scorer(function, f"{key}={name}", takes_targets, columns, positional, finite)


def _numbers(result: Any, responses: Sequence[str], function: str) -> list[float]:
    """Return the scores of a function as numbers.

    Raises:
        DataError: It has not returned a list, or an element of the list is not a number.
    """
    required = f"{function} must return a list with one number per response"
    try:
        values = list(result)
    except TypeError:
        raise DataError(f"{required}, got {_shortened(result)}.") from None
    scores: list[float] = []
    for index, value in enumerate(values):
        try:
            scores.append(float(value))
        except (TypeError, ValueError):
            of_response = f" (response {_shortened(responses[index])})" if index < len(responses) else ""
            raise DataError(f"{required}, but element {index} is {_shortened(value)}{of_response}.") from None
    return scores


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _import_function(name: str, key: str) -> Callable[..., Any]:
    """Import the function ``file.py:function``."""
    path, _, function_name = name.rpartition(":")
    if not path or not Path(path).is_file():
        raise ConfigError(
            f"{key} must name a function as <file.py>:<function>, got {name}: there is no such file.",
            f"Set {key}=<file.py>:<function>.",
        )
    digest = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:16]
    module_name = f"{Path(path).stem}_{digest}"  # unique: a file may have the name of an installed module
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"{key} must name a function in a Python file, got {name}.", f"Set {key}=<file.py>:<function>."
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # Dataclasses look up their module there.
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(module_name, None)
        raise
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(
            f"{key}={name}: {path} contains no function named {function_name!r}.", f"Set {key}={path}:<function>."
        )
    return function
