"""Summaries of evaluation, by hand."""

import math

import pytest
import torch

from rlhf.evaluate.metrics import (
    ModelResponses,
    compare_with_targets,
    monitored_win_rate,
    point_estimates,
    summarize,
)
from rlhf.metrics.evaluation_names import TARGET


def responses(**metrics: list[float]) -> ModelResponses:
    """Two responses with metrics."""
    return ModelResponses(["a", "b"], metrics)


def test_responses_of_batches_are_concatenated() -> None:
    model = ModelResponses()
    model.add(["a"], length=[3], truncated=[True])
    model.add(["b", "c"], length=torch.tensor([1, 2]), truncated=torch.tensor([False, True]))
    assert model.texts == ["a", "b", "c"]
    assert model.metrics == {"length": [3.0, 1.0, 2.0], "truncated": [1.0, 0.0, 1.0]}


def test_summary_by_hand() -> None:
    """PPO scores 2 and 0, SFT 1 and 0: means 1 and 0.5; PPO has a win and a tie, (1 + 0.5) / 2 = 0.75.

    Resamples of two values have the values themselves as bounds: for the win rate 0.5 and 1.
    """
    models = {"sft": responses(gold=[1.0, 0.0]), "ppo": responses(gold=[2.0, 0.0], length=[5.0, 7.0])}
    summary = summarize(models, baseline="sft", bootstrap=200)
    assert summary == {
        "sft": {"gold": {"mean": 0.5, "low": 0.0, "high": 1.0}},
        "ppo": {
            "gold": {"mean": 1.0, "low": 0.0, "high": 2.0},
            "length": {"mean": 6.0, "low": 5.0, "high": 7.0},
            "win_rate_vs_sft": {"gold": {"value": 0.75, "low": 0.5, "high": 1.0}},
        },
    }


def test_models_are_compared_with_targets_as_well() -> None:
    """Win rates cover the scorers only: gold and the reward model, not the length."""
    models = {
        "sft": responses(gold=[1.0, 0.0], reward=[1.0, 1.0], length=[1.0, 1.0]),
        TARGET: responses(gold=[0.0, 0.0], reward=[2.0, 2.0], length=[1.0, 1.0]),
    }
    summary = summarize(models, baseline="sft", bootstrap=10)
    assert {scorer: rate["value"] for scorer, rate in summary["sft"]["win_rate_vs_target"].items()} == {
        "gold": 0.75,
        "reward": 0.0,
    }
    assert summary[TARGET]["win_rate_vs_sft"]["reward"]["value"] == 1.0


def test_rouge_is_computed_if_every_prompt_has_a_target() -> None:
    """Two prompts and two targets: the texts are equal, so ROUGE-L is 1."""
    models = {"sft": responses(), TARGET: responses()}
    compare_with_targets(models, prompts=2)
    assert models["sft"].metrics["rougeL"] == [1.0, 1.0]
    assert models[TARGET].metrics["rougeL"] == [1.0, 1.0]


def test_targets_are_removed_if_a_prompt_has_none() -> None:
    """Three prompts and two targets: averages over different prompts would not be comparable."""
    models = {"sft": ModelResponses(["a", "b", "c"]), TARGET: responses()}
    compare_with_targets(models, prompts=3)
    assert models.keys() == {"sft"}
    assert models["sft"].metrics == {}


def test_point_estimates_are_flat_and_defined() -> None:
    summary = {
        "sft": {
            "gold": {"mean": float("nan"), "low": 0.0, "high": 0.0},
            "length": {"mean": 3.0, "low": 1.0, "high": 5},
        },
        "ppo": {"win_rate_vs_sft": {"gold": {"value": 0.75, "low": 0.5, "high": 1.0}}},
    }
    assert point_estimates(summary) == {"sft/length": 3.0, "ppo/win_rate_vs_sft/gold": 0.75}


def rates(**scorers: float) -> dict[str, dict[str, dict[str, float]]]:
    return {"win_rate_vs_sft": {scorer: {"value": value} for scorer, value in scorers.items()}}


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ({"sft": {}, "ppo": rates(gold=0.1), "dpo": rates(gold=0.2, reward=0.3), TARGET: rates(gold=0.9)}, 0.2),
        ({"sft": {}, "ppo": rates(reward=0.3)}, 0.3),
        ({"ppo": rates(gold=0.1), "sft": {}}, 0.1),
    ],
    ids=["last model, gold first", "reward model without gold", "the baseline is last"],
)
def test_monitored_win_rate_is_that_of_the_last_model(summary: dict, expected: float) -> None:
    assert monitored_win_rate(summary, "sft") == expected


def test_monitored_win_rate_is_nan_without_scorers() -> None:
    assert math.isnan(monitored_win_rate({"sft": {}, "ppo": rates()}, "sft"))
