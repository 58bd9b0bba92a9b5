"""Reference responses are checked before anything is sampled."""

from typing import Any

import pytest

from harness import TinyRun
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
