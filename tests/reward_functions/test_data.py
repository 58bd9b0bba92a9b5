"""What reward functions read of the data is checked before anything is sampled."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import TinyRun
from rlhf.data import PromptDataModule
from rlhf.errors import DataError
from rlhf.reward_functions import ExactMatchReward, PythonReward, RewardFunction, WeightedSumReward

GOOD, BAD = {"prompt": "2 + 2", "target": "#### 4"}, {"prompt": "Who?", "target": "no one"}


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


def weighted(**weights: float) -> RewardFunction:
    components = {"exact_match": ExactMatchReward(), "python": PythonReward(path="none.py:score")}
    return WeightedSumReward(components=components, weights=weights)


@pytest.mark.parametrize("reward", [ExactMatchReward(), weighted(exact_match=0.5, python=1.0)])
@pytest.mark.parametrize(
    ("rows", "line", "got"), [([GOOD, {"prompt": "Who?"}, BAD], 2, "None"), ([GOOD, GOOD, BAD], 3, "'no one'")]
)
def test_the_first_row_without_a_suitable_reference_is_named(
    tiny_run: TinyRun, reward: RewardFunction, rows: list[dict[str, Any]], line: int, got: str
) -> None:
    """Before the models are opened: the Python function of the weighted sum does not exist."""
    run = tiny_run.build("grpo", reward=reward, data={"train": tiny_run.write("rows", rows)})
    with pytest.raises(DataError, match=rf"rows\.jsonl:{line}: reward=exact_match requires .* a number, got {got}\.\n"):
        run.fit()
    assert run.module.iterations == 0


@pytest.mark.parametrize("held_out", [False, True])
def test_validation_prompts_are_checked_too(tiny_run: TinyRun, held_out: bool) -> None:
    """In their own file, or among the training data: one of two records is held out, and both lack a number."""
    paths = (
        {"train": tiny_run.write("rows", [BAD, BAD]), "val_fraction": 0.5}
        if held_out
        else {"train": tiny_run.write("train", [GOOD]), "val": tiny_run.write("rows", [BAD])}
    )
    run = tiny_run.build("grpo", reward=ExactMatchReward(), data=paths)
    with pytest.raises(DataError, match=r"rows\.jsonl:[12]: reward=exact_match requires"):
        run.fit()


def test_functions_that_need_no_targets_get_none(tiny_run: TinyRun) -> None:
    """A component without weight is not used, so that it does not count."""
    assert not weighted(python=1.0, exact_match=0.0).needs_targets
    assert weighted(python=1.0, exact_match=0.5).needs_targets
    assert not PythonReward().needs_targets
    tiny_run.train("grpo", data={"train": tiny_run.write("rows", [{"prompt": "Who?"}] * 2)}, trainer={"max_steps": 1})


LEVELS = "def score(prompts, responses, *, level, bonus=None): return [10.0 * value for value in level]"
ROWS = [{"prompt": f"Question {number}", "level": number} for number in range(8)]


def write_levels(folder: Path, code: str = LEVELS) -> str:
    path = folder / "levels.py"
    path.write_text(code)
    return f"{path}:score"


@pytest.mark.parametrize("stored", ["objects", "table"])
def test_a_python_function_receives_columns_of_its_prompts(
    tiny_run: TinyRun, tmp_path: Path, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in validation, of few rows, and of many, which are stored in Arrow. Two responses per prompt."""
    monkeypatch.setattr("rlhf.data.encode_split.CACHED_ROWS", 0 if stored == "table" else 100)
    reward = WeightedSumReward(components={"levels": PythonReward(path=write_levels(tmp_path))}, weights={"levels": 1})
    scored: list[tuple[list[str], dict[str, Any]]] = []
    score = reward.components["levels"].forward
    monkeypatch.setattr(
        reward.components["levels"],
        "forward",
        lambda batch: (scored.append((list(batch.prompts), dict(batch.columns))), score(batch))[1],
    )
    data = {"train": tiny_run.write("rows", ROWS), "val_fraction": 0.25, "batch_size": 3}
    tiny_run.train("grpo", reward=reward, data=data)
    assert {prompt for prompts, _ in scored for prompt in prompts} == {row["prompt"] for row in ROWS}
    for prompts, columns in scored:
        assert columns == {"level": [int(prompt.split()[-1]) for prompt in prompts]}


def test_a_python_function_with_keywords_receives_all_columns(tiny_run: TinyRun, tmp_path: Path) -> None:
    """In training and in validation. A component of the sum that names its columns receives these only."""
    code = "rows = []\ndef score(prompts, responses, **columns):\n    rows.extend(zip(prompts, *columns.values()))\n"
    every = PythonReward(path=write_levels(tmp_path, f"{code}    return [float(len(columns))] * len(responses)\n"))
    (tmp_path / "other").mkdir()
    named = PythonReward(path=write_levels(tmp_path / "other"))
    reward = WeightedSumReward(components={"every": every, "named": named}, weights={"every": 1, "named": 1})
    data = {"train": tiny_run.write("rows", [{**row, "a b": "x"} for row in ROWS]), "val_fraction": 0.25}
    tiny_run.train("grpo", reward=reward, data=data)
    received = set(every.function.function.__globals__["rows"])
    assert received == {(row["prompt"], "x", row["level"], row["prompt"]) for row in ROWS}


@pytest.mark.parametrize(
    ("column", "fix"), [("levle", r"Did you mean 'levle'\?"), ("x", "Add the column, or give the parameter a default")]
)
def test_a_required_column_that_the_data_lack_is_reported(
    tiny_run: TinyRun, tmp_path: Path, column: str, fix: str
) -> None:
    rows = [{"prompt": "Who?", column: 1}] * 2
    reward = PythonReward(path=write_levels(tmp_path))
    run = tiny_run.build("grpo", reward=reward, data={"train": tiny_run.write("rows", rows)})
    message = rf"rows\.jsonl: the data have no column 'level', .* \(columns: prompt, {column}\)\.\n  {fix}"
    with pytest.raises(DataError, match=message):
        run.fit()
    assert run.module.iterations == 0


def test_a_row_without_a_column_of_the_data_has_none_there(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several tasks need not have the columns of all of them. Invalid rows are skipped."""
    rows = [{"prompt": "Who?"}, {"level": 2}, {"prompt": "How?", "level": 3}]
    data = tiny_run.datamodule("grpo", train=tiny_run.write("rows", rows), on_error="skip")
    monkeypatch.setattr(PromptDataModule, "module", SimpleNamespace(response_budget=4))
    data.read_columns({"level": True, "bonus": False}, "train", "a function")
    batch = data.collate(list(data.encoded("train")))
    assert [(prompt.raw_text, prompt.columns) for prompt in batch.prompts] == [
        ("Who?", {"level": None}),
        ("How?", {"level": 3}),
    ]
