"""Collection of experience: rollout batches, scores, samples, validation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import DEMONSTRATIONS, EXACT, NO_UPDATE, Run, TinyRun, assert_same_weights, weights_differ
from rlhf.errors import ConfigError, TrainingError
from rlhf.reward_functions import RewardFunction, ScoringBatch, WeightedSumReward
from rlhf.rl import KLController
from rlhf.rl.collector import Collector, concatenate
from rlhf.sampling import LocalSampler, Rollout


@pytest.fixture(scope="session")
def architecture() -> str:
    """Collection does not depend on the architecture."""
    return "transformer"


class CountingSampler(LocalSampler):
    """Records the number of prompts of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def sample(self, prompts: Any, params: Any) -> Rollout:
        self.sizes.append(len(prompts))
        return super().sample(prompts, params)


def test_a_rollout_is_sampled_in_batches(tiny_run: TinyRun) -> None:
    sampler = CountingSampler()
    run = tiny_run.train("ppo", sampler=sampler, rollout_batch_size=3, ppo_epochs=1, minibatch_size=8)
    assert sampler.sizes == [3, 3, 2]
    assert len(run.batches[0].input_ids) == 8
    assert run.recorder.updates[0]["policy/ratio"] == 1.0
    with pytest.raises(ConfigError, match=r"stage\.rollout_batch_size must be an integer of at least 1 or null, got 0"):
        tiny_run.module("ppo", rollout_batch_size=0)


def test_rollouts_are_joined_by_padding_on_the_right() -> None:
    parts = [Rollout.from_responses([[1]], [[5, 2]], [2]), Rollout.from_responses([[1, 3]], [[6, 7]], [2])]
    whole = concatenate(parts)
    assert whole.input_ids.tolist() == [[1, 5, 2, 0], [1, 3, 6, 7]]
    assert whole.attention_mask.tolist() == [[True, True, True, False], [True] * 4]
    assert whole.response_mask.tolist() == [[False, True, True, False], [False, False, True, True]]
    assert whole.finished.tolist() == [True, False]
    assert whole.stop_ids == (2,)


class FixedReward(RewardFunction):
    """Returns given scores."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.given = scores

    def forward(self, batch: ScoringBatch) -> Tensor:
        return torch.tensor(self.given, dtype=torch.float, device=batch.input_ids.device)


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda: torch.ones(8, 1), r"one of shape \[8, 1\]"),
        (lambda: torch.ones(()), r"one of shape \[\]"),
        (lambda: torch.ones(7), r"one of shape \[7\]"),
        (lambda: [1.0] * 8, "a list"),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_rewards_of_another_shape_are_refused(
    tiny_run: TinyRun, make: Callable[[], Any], given: str, weighted: bool
) -> None:
    """Eight responses have eight rewards. Within a weighted sum, the message names the component."""

    class Misshapen(RewardFunction):
        def forward(self, batch: ScoringBatch) -> Any:
            return make()

    reward = WeightedSumReward(components={"mine": Misshapen()}, weights={"mine": 2.0}) if weighted else Misshapen()
    message = rf"^The reward function Misshapen must return a tensor of shape \[8\], got {given}\.\n"
    with pytest.raises(ConfigError, match=message):
        tiny_run.train("ppo", reward=reward, critic_init="sft")


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_an_error(tiny_run: TinyRun, score: float) -> None:
    with pytest.raises(TrainingError, match=rf"the score of 1 of 8 responses \({score}\) is not finite"):
        tiny_run.train("ppo", reward=FixedReward([score, *[0.0] * 7]), critic_init="sft")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_moments_and_penalty_do_not_depend_on_the_precision(tiny_run: TinyRun, precision: str) -> None:
    """Scores with 12 significant bits: bfloat16 would keep 8 of them. Moments and coefficient are plain numbers."""
    scores = [1.0 + number / 2048 for number in range(8)]
    run = tiny_run.train("grpo", reward=FixedReward(scores), trainer={"precision": precision, "max_steps": 1})
    mean = sum(scores) / 8
    assert run.module.scores.mean == pytest.approx(mean, rel=1e-12)
    assert run.module.scores.std == pytest.approx((sum((score - mean) ** 2 for score in scores) / 8) ** 0.5, rel=1e-12)
    assert run.module.scores.state_dict()["_extra_state"]["count"] == 8
    assert run.module.kl.coef == 0.2


def test_tensors_of_a_reward_function_are_float32(tiny_run: TinyRun) -> None:
    """bfloat16 has 8 significant bits, so it would round 257 = 2^8 + 1 to 256. Training leaves the default as it is."""

    class DefaultReward(FixedReward):
        def forward(self, batch: ScoringBatch) -> Tensor:
            return torch.tensor(self.given)

    reward = DefaultReward([257.0] * 8)
    run = tiny_run.train("ppo", reward=reward, critic_init="sft", trainer={"precision": "bf16-true", "max_steps": 1})
    assert run.module.scores.mean == 257.0
    assert torch.get_default_dtype() == torch.float32


def test_scores_of_any_precision_are_accepted(tiny_run: TinyRun) -> None:
    class HalfReward(FixedReward):
        def forward(self, batch: ScoringBatch) -> Tensor:
            return super().forward(batch).bfloat16()

    run = tiny_run.train("ppo", reward=HalfReward([0.0, 1.0] * 4), critic_init="sft", trainer={"max_steps": 1})
    assert run.module.scores.mean == 0.5


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_samples_are_shown_at_intervals(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Two of four iterations, with the first response to each of two prompts."""
    tables: list[Any] = []
    monkeypatch.setattr(
        "rlhf.stage.StageModule.log_samples", lambda self, header, rows: tables.append((header, list(rows)))
    )
    run = tiny_run.train(stage, samples=2, sample_interval=2, trainer={"max_epochs": 4})
    iterations = len(run.recorder.rollouts)
    assert len(tables) == iterations // 2 >= 2
    prompts = {row["prompt"] for row in DEMONSTRATIONS}
    for header, rows in tables:
        assert header == ("prompt", "response", "score", "KL in nats")
        assert len(rows) == 2
        assert {row[0] for row in rows} <= prompts
    assert [row[3] for row in tables[0][1]] == [0.0, 0.0]
    assert all(row[3] != 0 for row in tables[1][1])


@pytest.mark.parametrize(("stage", "apply_to"), [("ppo", "reward"), ("grpo", "loss")])
def test_without_monitoring_there_is_no_reference_model(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, stage: str, apply_to: Any
) -> None:
    """The weights are those of a run that monitors the KL, and no metric or sample shows a KL."""
    headers: list[Any] = []
    monkeypatch.setattr("rlhf.stage.StageModule.log_samples", lambda self, header, rows: headers.append(header))

    def train(*, monitor: bool) -> Run:
        kl = KLController(apply_to=apply_to, estimator="k3", monitor=monitor)
        data = {"val": tiny_run.write("val", DEMONSTRATIONS[:2])}
        return tiny_run.train(stage, data=data, kl=kl, kl_coef=0.0, trainer={"max_epochs": 2})

    def metrics(run: Run) -> set[str]:
        return set().union(*run.logger.calls)

    monitored, unmonitored = train(monitor=True), train(monitor=False)
    assert unmonitored.module.reference is None
    assert_same_weights(unmonitored.module.policy.lm, monitored.module.policy.lm, **EXACT)
    missing = {"objective/kl", "objective/kl_estimate", "val/kl"} | ({"loss/kl_avg"} if apply_to == "loss" else set())
    assert metrics(monitored) - metrics(unmonitored) == missing
    assert [header[2:] for header in headers] == [("score", "KL in nats"), ("score",)]


def test_no_samples_are_shown_if_there_are_none(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[Any] = []
    monkeypatch.setattr("rlhf.stage.StageModule.log_samples", lambda *arguments: tables.append(arguments))
    tiny_run.train("ppo", samples=0)
    assert tables == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"samples": -1}, r"stage\.samples must be an integer of at least 0, got -1"),
        ({"sample_interval": 0}, r"stage\.sample_interval must be an integer of at least 1, got 0"),
    ],
)
def test_invalid_samples_are_refused(tiny_run: TinyRun, keys: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run.module("ppo", **keys)


def test_validation_does_not_change_training(tiny_run: TinyRun) -> None:
    """With and without validation, the weights are the same; every validation logs how many responses were cut."""
    data = {"val": tiny_run.write("val", DEMONSTRATIONS)}
    without = tiny_run.train("ppo", trainer={"max_epochs": 2})
    validated = tiny_run.train("ppo", data=data, trainer={"max_epochs": 2})
    assert_same_weights(validated.module, without.module, **EXACT)
    assert weights_differ(validated.module.policy.lm, tiny_run.lm)
    (truncated, _), kl = validated.curve("val/truncated"), validated.curve("val/kl")
    assert 0 <= truncated <= 1
    assert len(kl) == 2


def test_validation_evaluates_rollouts_in_minibatches(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 prompts with 4 responses each are 32 responses: 10 minibatches of 3 and one of 2.

    The KL is the mean over the 32 responses, as if they were evaluated at once.
    """
    sizes: list[int] = []
    whole: list[float] = []
    evaluate, evaluate_in_order = Collector._evaluate, Collector.evaluate_in_order

    def recorded(self: Collector, inputs: Any) -> Any:
        sizes.append(len(inputs.input_ids))
        return evaluate(self, inputs)

    def compared(self: Collector, rollout: Rollout, size: int) -> Any:
        whole.append(float(self.evaluate_rollout(rollout, [range(32)]).kl_per_sequence.mean()))
        sizes.clear()
        return evaluate_in_order(self, rollout, size)

    monkeypatch.setattr(Collector, "_evaluate", recorded)
    monkeypatch.setattr(Collector, "evaluate_in_order", compared)
    run = tiny_run.train("grpo", data={"val": tiny_run.write("val", DEMONSTRATIONS)}, minibatch_size=3)
    assert sizes == [3] * 10 + [2]
    assert whole[0] != 0
    assert run.curve("val/kl") == pytest.approx(whole, rel=1e-4)


def test_every_validation_draws_the_same_numbers(tiny_run: TinyRun) -> None:
    """A policy that does not change has the same scores in both validations."""
    data = {"val": tiny_run.write("val", DEMONSTRATIONS)}
    run = tiny_run.train("ppo", data=data, trainer={"max_epochs": 2}, learning_rate=NO_UPDATE)
    first, second = run.curve("val/score")
    assert first == second
