"""Rewards from a Python function of the user."""

import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.errors import ConfigError, DataError
from rlhf.models import ModelSource
from rlhf.reward_functions.base import RewardFunction, ScoringBatch
from rlhf.schema import ScorerPath

SHOWN = 60  # characters of a value or a response in an error message
POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL)
Scorer: TypeAlias = Callable[[Sequence[str], Sequence[str], Sequence[str | None]], list[float]]


class PythonReward(RewardFunction):
    """Scores responses with a Python function.

    Args:
        path: The function, as ``file.py:function``. It receives the prompts, as in the data, and one response per
            prompt, and returns one finite number per response, in reward units. If it takes a third argument, it also
            receives the reference responses of the data (None where there is none).
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
        # Training checks the scores of all reward functions itself: stage.on_nonfinite decides what happens.
        self.function = load_scorer(self.path, key="reward.path", finite=False)

    def forward(self, batch: ScoringBatch) -> Tensor:
        scores = self.function(batch.prompts, batch.responses, batch.targets)
        return torch.tensor(scores, dtype=torch.float, device=batch.input_ids.device)


def load_scorer(name: str, *, key: str, finite: bool = True) -> Scorer:
    """Load a scoring function, wrapped so that its scores are checked.

    Args:
        name: The function, as ``file.py:function``; its arguments are described in ``PythonReward``.
        key: Configuration key that contains ``name``, for error messages.
        finite: Reject scores that are not finite.

    Returns:
        A function of prompts, responses and targets.

    Raises:
        ConfigError: There is no such file or function.
    """
    function = _import_function(name, key)
    takes_targets = sum(parameter.kind in POSITIONAL for parameter in signature(function).parameters.values()) > 2
    try:
        signature(function).bind(*range(3 if takes_targets else 2))
    except TypeError as error:
        raise ConfigError(
            f"{key}={name}: the function must have two parameters, the prompts and the responses ({error}).",
            "Define it as def score(prompts, responses).",
        ) from error

    def score(prompts: Sequence[str], responses: Sequence[str], targets: Sequence[str | None]) -> list[float]:
        arguments: list[Any] = [list(prompts), list(responses), list(targets)]
        scores = _numbers(function(*(arguments if takes_targets else arguments[:2])), responses, f"{key}={name}")
        if len(scores) != len(responses):
            raise DataError(f"{key}={name} returned {len(scores)} scores for {len(responses)} responses.")
        for score, response in zip(scores, responses, strict=True):
            if finite and not math.isfinite(score):
                raise DataError(f"{key}={name} returned the non-finite score {score} for the response {response!r}.")
        return scores

    return score


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
