"""Scoring functions of the user: any Python function ``file.py:function`` from prompts and answers to numbers."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from rlhf.errors import UserError

Scorer: TypeAlias = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


def load_scorer(name: str) -> Scorer:
    """The function that ``file.py:function`` names, wrapped so that a wrong answer of it says so.

    It gets the prompts as they stand in the data and one answer each, and returns one finite number each, higher is
    better.
    """
    path, _, function_name = name.rpartition(":")
    if not path or not Path(path).is_file():
        raise UserError(f"gold={name}: no such file", "gold=<file.py>:<function>")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None  # it is a file
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"gold={name}: {path} has no function '{function_name}'")

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        scores = [float(value) for value in function(prompts, answers)]
        if len(scores) != len(answers) or not all(map(math.isfinite, scores)):
            raise UserError(
                f"gold={name}: {len(answers)} answers, but {len(scores)} numbers, or not all of them finite"
            )
        return scores

    return score
