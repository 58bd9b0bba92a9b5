"""Weighted sums of rewards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from contract.configs import compose_config
from rlhf.config import check_values
from rlhf.errors import ConfigError
from rlhf.reward_functions import ExactMatchReward, ModelReward, PythonReward, WeightedSumReward


def test_weighted_sum_by_hand(tmp_path: Path, make_batch: Any, load: Callable[..., Any]) -> None:
    """0.5 x length + 2 x exact match: 0.5 x 9 + 2 = 6.5 for "ab #### 1", 0.5 x 6 + 0 = 3 for "#### 2"."""
    path = tmp_path / "mine.py"
    path.write_text("def score(prompts, responses): return [len(r) for r in responses]")
    components = {
        "python": PythonReward(path=f"{path}:score"),
        "exact_match": ExactMatchReward(),
        "model": ModelReward(),
    }
    weights = {"python": 0.5, "exact_match": 2.0, "model": 0.0}
    reward = load(WeightedSumReward(components=components, weights=weights))
    assert not reward.needs_model
    total, by_component = reward.score_with_components(make_batch("ab #### 1", "#### 2", targets=("#### 1",) * 2))
    assert total.tolist() == [6.5, 3.0]
    assert {name: scores.tolist() for name, scores in by_component.items()} == {"python": [9, 6], "exact_match": [1, 0]}


def test_weighted_sum_needs_a_model_if_a_component_does() -> None:
    assert WeightedSumReward(components={"model": ModelReward()}, weights={"model": 1.0}).needs_model


def test_several_python_functions_are_added_by_their_paths(
    tmp_path: Path, make_batch: Any, load: Callable[..., Any]
) -> None:
    """2 x number of letters - number of spaces: 2 x 3 - 1 = 5 for "a b", 2 x 2 - 0 = 4 for "ab"."""
    path = tmp_path / "mine.py"
    path.write_text(
        "def letters(prompts, responses): return [len(r) for r in responses]\n"
        "def spaces(prompts, responses): return [r.count(' ') for r in responses]\n"
    )
    overrides = [f"+reward.components.{name}.path={path}:{name}" for name in ("letters", "spaces")]
    weights = ["reward.weights.model=0", "+reward.weights.letters=2", "+reward.weights.spaces=-1"]
    cfg = compose_config("stage=grpo", "reward=weighted_sum", *overrides, *weights)
    check_values(cfg)
    reward = load(instantiate(cfg.stage, _partial_=True).keywords["reward"])
    total, by_component = reward.score_with_components(make_batch("a b", "ab"))
    assert total.tolist() == [5.0, 4.0]
    assert {name: scores.tolist() for name, scores in by_component.items()} == {"letters": [3, 2], "spaces": [1, 0]}


@pytest.mark.parametrize("name", ["type", "values", "forward"])
def test_a_component_may_be_named_like_a_method_of_a_module(make_batch: Any, name: str) -> None:
    """3 x 1 for a correct response."""
    reward = WeightedSumReward(components={name: ExactMatchReward()}, weights={name: 3.0})
    total, by_component = reward.score_with_components(make_batch("#### 1", targets=("#### 1",)))
    assert total.tolist() == [3.0]
    assert {key: scores.tolist() for key, scores in by_component.items()} == {name: [1.0]}


def test_a_component_without_a_class_must_have_a_path() -> None:
    with pytest.raises(ConfigError, match=r"reward\.components\.mine must have the key path, .* got pth\.\n"):
        WeightedSumReward(components={"mine": {"pth": "mine.py:score"}}, weights={"mine": 1.0})


def test_weights_must_belong_to_components_and_not_all_be_zero() -> None:
    with pytest.raises(ConfigError, match=r"reward\.weights must contain a weight other than 0"):
        WeightedSumReward(components={"exact_match": ExactMatchReward()}, weights={"exact_match": 0.0})
    with pytest.raises(ConfigError, match=r"reward\.weights contains gold, which is not one of the components"):
        WeightedSumReward(components={"exact_match": ExactMatchReward()}, weights={"gold": 1.0})


def test_names_of_components_contain_no_dots() -> None:
    with pytest.raises(ConfigError, match=r"reward\.components contains 'math\.exact'.*\n.*Rename it to math_exact"):
        WeightedSumReward(components={"math.exact": ExactMatchReward()}, weights={"math.exact": 1.0})
