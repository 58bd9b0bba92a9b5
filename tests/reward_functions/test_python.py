"""Rewards from Python functions."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ConfigError, DataError
from rlhf.reward_functions import PythonReward, load_scorer


def write_function(folder: Path, code: str) -> str:
    path = folder / "mine.py"
    path.write_text(code)
    return f"{path}:score"


def test_function_receives_prompts_and_responses(tmp_path: Path, make_batch: Any, load: Callable[..., Any]) -> None:
    """Length of the prompt plus 10 times the length of the response: 2 + 10 and 2 + 30."""
    path = write_function(
        tmp_path, "def score(prompts, responses): return [len(p) + 10 * len(r) for p, r in zip(prompts, responses)]"
    )
    assert load(PythonReward(path=path))(make_batch("a", "bcd")).tolist() == [12.0, 32.0]


def test_function_with_three_arguments_receives_targets(
    tmp_path: Path, make_batch: Any, load: Callable[..., Any]
) -> None:
    path = write_function(
        tmp_path, "def score(prompts, responses, targets): return [float(r == t) for r, t in zip(responses, targets)]"
    )
    assert load(PythonReward(path=path))(make_batch("x", "y", targets=("x", "z"))).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "parameters", ["prompts, responses, *, scale=2", "prompts, responses, **keys", "prompts, responses, *, a=1, **keys"]
)
def test_only_positional_parameters_receive_arguments(tmp_path: Path, parameters: str) -> None:
    """A third argument, the targets, would be one too many."""
    path = write_function(tmp_path, f"def score({parameters}): return [len(text) for text in responses]")
    assert load_scorer(path, key="reward.path")(["p"], ["abc"], [None]) == [3.0]


def test_keyword_only_parameters_receive_columns(tmp_path: Path) -> None:
    """One with a default keeps it if the data lack its column."""
    path = write_function(
        tmp_path,
        "def score(prompts, responses, *, level, scale=(2,)): return [scale[0] * value for value in level]",
    )
    scorer = load_scorer(path, key="reward.path")
    assert scorer.columns == {"level": True, "scale": False}
    assert scorer(["p"], ["r"], [None], {"level": [3], "other": [0]}) == [6.0]
    assert scorer(["p"], ["r"], [None], {"level": [3], "scale": [5]}) == [15.0]


@pytest.mark.parametrize(
    ("parameters", "received"),
    [
        ("prompts, responses, **columns", ["level", "targets", "text"]),
        ("prompts, responses, targets, **columns", ["level", "text"]),
        ("prompts, responses, /, *, level, **columns", ["prompts", "targets", "text"]),
        ("*texts, **columns", ["level", "prompts", "targets", "text"]),
    ],
)
def test_keywords_receive_all_columns_without_a_parameter(tmp_path: Path, parameters: str, received: list[str]) -> None:
    """A positional parameter cannot be passed by keyword as well, unless it precedes a slash."""
    path = write_function(
        tmp_path, f"found = []\ndef score({parameters}):\n    found.append(columns)\n    return [1.0]\n"
    )
    scorer = load_scorer(path, key="reward.path")
    columns = {name: [name] for name in ("level", "prompts", "targets", "text")}
    assert scorer(["p"], ["r"], [None], columns) == [1.0]
    assert scorer.function.__globals__["found"] == [{name: [name] for name in received}]


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ("prompts, responses, targets, scale", "missing a required argument: 'scale'"),
        ("prompts, *, responses=()", "too many positional arguments"),
    ],
)
def test_a_function_that_cannot_be_called_is_rejected_when_it_is_loaded(
    tmp_path: Path, parameters: str, reason: str
) -> None:
    path = write_function(tmp_path, f"def score({parameters}): return [1.0]")
    with pytest.raises(ConfigError, match=rf"must have two parameters, the prompts and the responses \({reason}"):
        load_scorer(path, key="reward.path")


def test_a_file_may_define_dataclasses_with_postponed_annotations(tmp_path: Path) -> None:
    """``dataclasses`` looks up the module of such a class in ``sys.modules``."""
    path = write_function(
        tmp_path,
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Weights:\n"
        "    length: float = 2.0\n"
        "def score(prompts, responses): return [Weights().length * len(text) for text in responses]\n",
    )
    assert load_scorer(path, key="reward.path")(["p"], ["abc"], [None]) == [6.0]


def test_a_file_with_the_name_of_a_library_does_not_replace_it(tmp_path: Path) -> None:
    path = tmp_path / "json.py"
    path.write_text("def score(prompts, responses): return [1.0]")
    assert load_scorer(f"{path}:score", key="reward.path")(["p"], ["a"], [None]) == [1.0]
    assert sys.modules["json"] is json


def test_a_file_that_cannot_be_imported_leaves_no_module(tmp_path: Path) -> None:
    before = set(sys.modules)
    with pytest.raises(ZeroDivisionError):
        load_scorer(write_function(tmp_path, "1 / 0"), key="reward.path")
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def score(prompts, responses): return [1.0]", "returned 1 scores for 2 responses"),
        ("def score(prompts, responses): return ['x', 'y']", r", but element 0 is 'x' \(response 'a'\)\.$"),
        ("def score(prompts, responses): return [1.0, None]", r", but element 1 is None \(response 'b'\)\.$"),
        ("def score(prompts, responses): return [1.0, 2.0, None]", r", but element 2 is None\.$"),
        ("def score(prompts, responses): return [0, 'x' * 90]", r"element 1 is 'x{59}\.\.\. \(response 'b'\)\.$"),
        ("def score(prompts, responses): return None", "must return a list with one number per response, got None"),
        ("def score(*texts): return 0.5", "must return a list with one number per response, got 0.5"),
        ("def score(prompts, responses): return [1.0, float('nan')]", "non-finite score nan for the response 'b'"),
    ],
)
def test_invalid_scores_are_errors_that_name_the_function(tmp_path: Path, code: str, message: str) -> None:
    path = write_function(tmp_path, code)
    with pytest.raises(DataError, match=message) as raised:
        load_scorer(path, key="stage.gold")(["p", "q"], ["a", "b"], [None, None])
    assert str(raised.value).startswith(f"stage.gold={path}")


def test_training_decides_what_happens_with_scores_that_are_not_finite(
    tmp_path: Path, make_batch: Any, load: Callable[..., Any]
) -> None:
    """``stage.on_nonfinite`` applies to the scores of every reward function."""
    path = write_function(tmp_path, "def score(prompts, responses): return [1.0, float('nan')]")
    assert load(PythonReward(path=path))(make_batch("a", "b")).isnan().tolist() == [False, True]


def test_a_function_of_prompts_alone_is_rejected_when_it_is_loaded(tmp_path: Path) -> None:
    path = write_function(tmp_path, "def score(prompts): return [1.0]")
    with pytest.raises(ConfigError, match="must have two parameters, the prompts and the responses"):
        load_scorer(path, key="reward.path")


def test_missing_file_or_function_is_an_error(tmp_path: Path, load: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"reward=python requires reward\.path"):
        load(PythonReward())
    with pytest.raises(ConfigError, match=r"reward\.path .* got no\.py:score: there is no such file"):
        load(PythonReward(path="no.py:score"))
    path = write_function(tmp_path, "def other(prompts, responses): return [1.0]")
    with pytest.raises(ConfigError, match="contains no function named 'score'"):
        load(PythonReward(path=path))
