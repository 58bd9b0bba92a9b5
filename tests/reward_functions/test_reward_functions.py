"""Rewards from models, functions, checkable answers and sums of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models import ScalarModel
from rlhf.reward_functions import ExactMatchReward, ModelReward, PythonReward, ScoringBatch, WeightedSumReward
from rlhf.reward_functions.exact_match import final_number


def answers(*texts: str, targets: tuple[str | None, ...] | None = None) -> ScoringBatch:
    tokens = torch.zeros(len(texts), 3, dtype=torch.long)
    return ScoringBatch(
        tokens, tokens == 0, [f"p{i}" for i in range(len(texts))], texts, targets or (None,) * len(texts)
    )


def written(folder: Path, code: str) -> str:
    path = folder / "mine.py"
    path.write_text(code)
    return f"{path}:score"


def opened(reward: Any, *sources: Any) -> Any:
    reward.load(sources, None)
    return reward


class Judge(nn.Module):
    """A reward model whose heads say what they are told, whatever the answer."""

    def __init__(self, *heads: float) -> None:
        super().__init__()
        self.heads = heads

    def scores(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return torch.tensor([self.heads]).expand(len(tokens), -1)

    def source(self) -> Any:
        return SimpleNamespace(scalar_model=lambda tokenizer: self)


def test_a_function_gets_prompts_and_answers(tmp_path: Path) -> None:
    name = written(
        tmp_path, "def score(prompts, answers): return [len(p) + 10 * len(a) for p, a in zip(prompts, answers)]"
    )
    assert opened(PythonReward(path=name))(answers("a", "bcd")).tolist() == [12.0, 32.0]


def test_a_function_of_three_gets_the_targets(tmp_path: Path) -> None:
    name = written(
        tmp_path, "def score(prompts, answers, targets): return [float(a == t) for a, t in zip(answers, targets)]"
    )
    assert opened(PythonReward(path=name))(answers("x", "y", targets=("x", "z"))).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def score(prompts, answers): return [1.0]", "2 answers, but 1 numbers"),
        ("def score(prompts, answers): return [1.0, float('nan')]", "not all of them finite"),
        ("def other(prompts, answers): return [1.0]", "has no function 'score'"),
    ],
)
def test_a_function_that_answers_wrongly_is_named(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        opened(PythonReward(path=written(tmp_path, code)))(answers("a", "b"))
    assert str(raised.value).startswith("reward.path=")


def test_no_function_is_an_error() -> None:
    with pytest.raises(UserError, match=r"reward\.path names no function"):
        opened(PythonReward(path=None))
    with pytest.raises(UserError, match=r"reward\.path=no\.py:score: no such file"):
        opened(PythonReward(path="no.py:score"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 + 4 = 7 apples.\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("so 5 #### 6 #### -2.50 euros 9", "-2.50"),
        ("the answer is 12, or 13", "13"),
        ("none", None),
        ("#### none 3", "3"),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    """After the last marker the first number; without one the last number of the text."""
    from decimal import Decimal

    assert final_number(text, "####", strict=False) == (None if number is None else Decimal(number))


def test_exact_answers_by_hand() -> None:
    """18 and 18.0 are the same number; without the marker an answer is wrong only if strict; no number is wrong."""
    given = answers("9 + 9 #### 18.0", "it is 18", "#### 17", "eighteen", targets=("... #### 18",) * 4)
    assert ExactMatchReward(wrong=-0.5)(given).tolist() == [1.0, 1.0, -0.5, -0.5]
    assert ExactMatchReward(strict=True)(given).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_exact_answer_needs_something_to_compare_with() -> None:
    for target in (None, "no number"):
        with pytest.raises(UserError, match="no number to compare with"):
            ExactMatchReward()(answers("#### 1", targets=(target,)))
    with pytest.raises(UserError, match=r"reward\.correct=0.* is not above reward\.wrong=0"):
        ExactMatchReward(correct=0.0)


def test_several_rewards_are_weighed(tmp_path: Path) -> None:
    """0.5 x length + 2 x exactness: 'ab #### 1' is 9 long and right: 4.5 + 2; '#### 2' 6 long and wrong: 3."""
    name = written(tmp_path, "def score(prompts, answers): return [len(a) for a in answers]")
    parts = {"function": PythonReward(path=name), "exact_match": ExactMatchReward(), "model": ModelReward()}
    total = opened(WeightedSumReward(parts=parts, weights={"function": 0.5, "exact_match": 2.0, "model": 0.0}))
    assert not total.needs_model
    given = answers("ab #### 1", "#### 2", targets=("#### 1",) * 2)
    rewards, single = total.detailed(given)
    assert rewards.tolist() == [6.5, 3.0]
    assert {key: values.tolist() for key, values in single.items()} == {"function": [9, 6], "exact_match": [1, 0]}


def test_a_sum_of_nothing_and_of_unknown_parts_is_refused() -> None:
    with pytest.raises(UserError, match="nothing is rewarded"):
        WeightedSumReward(components={"exact_match": ExactMatchReward()}, weights={"exact_match": 0.0})
    with pytest.raises(UserError, match=r"reward\.weights\.gold: there is no such part"):
        WeightedSumReward(components={"exact_match": ExactMatchReward()}, weights={"gold": 1.0})


def test_the_spread_of_an_ensemble_is_a_penalty() -> None:
    """Heads 1 and 3, and another member with 5: mean 3, deviation sqrt((4 + 0 + 4) / 3); with coefficient 2 both."""
    sources = Judge(1.0, 3.0).source(), Judge(5.0).source()
    given = answers("a", "b")
    assert opened(ModelReward(batch_size=1), *sources)(given).tolist() == [3.0, 3.0]
    expected = 3 - 2 * (8 / 3) ** 0.5
    assert opened(ModelReward(uncertainty_penalty=2.0), *sources)(given).tolist() == pytest.approx([expected] * 2)


def test_a_single_score_has_no_spread() -> None:
    with pytest.raises(UserError, match=r"reward\.uncertainty_penalty=1.*a single score has no spread"):
        opened(ModelReward(uncertainty_penalty=1.0), Judge(1.0).source())(answers("a"))
    with pytest.raises(UserError, match=r"reward\.uncertainty_penalty=-1"):
        ModelReward(uncertainty_penalty=-1.0)


def test_reward_models_are_frozen_and_not_stored(judge: Any) -> None:
    reward = opened(ModelReward(), judge)
    reward.train()
    assert isinstance(reward.model.model, ScalarModel)
    assert not any(part.training for part in reward.model.model.modules())
    assert not list(reward.parameters())
    assert not reward.state_dict()
