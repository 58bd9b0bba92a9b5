"""Rewards by a function of the user: any Python function ``file.py:function`` from prompts and answers to numbers."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.reward_functions.base import ScoringBatch
from rlhf.reward_functions.weighted_sum import RewardFunction

Scorer: TypeAlias = Callable[[Sequence[str], Sequence[str], Sequence[str | None]], list[float]]


class PythonReward(RewardFunction):
    """Scores answers by a Python function.

    Args:
        path: ``file.py:function``. The function gets the prompts as they stand in the data and one answer each, and
            returns one finite number each, reward units. If it takes a third argument, it gets the data's own answers
            too (None where there is none).
    """

    def __init__(self, *, path: str | None) -> None:
        super().__init__()
        self.path = path

    def load(self, sources: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> None:
        if self.path is None:
            raise UserError("reward.path names no function", "reward.path=<file.py>:<function>")
        self.function = load_scorer(self.path, key="reward.path")

    def forward(self, answers: ScoringBatch) -> Tensor:
        scores = self.function(answers.prompts, answers.texts, answers.targets)
        return torch.tensor(scores, dtype=torch.float, device=answers.input_ids.device)


def load_scorer(name: str, *, key: str) -> Scorer:
    """The function that ``file.py:function`` names, wrapped so that a wrong answer of it says so.

    Args:
        name: ``file.py:function``, as in PythonReward.
        key: the configuration key that named it, for errors.
    """
    path, _, function_name = name.rpartition(":")
    if not path or not Path(path).is_file():
        raise UserError(f"{key}={name}: no such file", f"{key}=<file.py>:<function>")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None  # it is a file
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{key}={name}: {path} has no function '{function_name}'")
    takes_targets = len(signature(function).parameters) > 2

    def score(prompts: Sequence[str], answers: Sequence[str], targets: Sequence[str | None]) -> list[float]:
        given = (list(prompts), list(answers), list(targets)) if takes_targets else (list(prompts), list(answers))
        scores = [float(value) for value in function(*given)]
        if len(scores) != len(answers) or not all(map(math.isfinite, scores)):
            raise UserError(
                f"{key}={name}: {len(answers)} answers, but {len(scores)} numbers, or not all of them finite"
            )
        return scores

    return score
