"""Alerts: each fires once on a series made for it, and none fires on a healthy run."""

import json
import logging
import math
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from harness import NO_UPDATE, MetricsLogger, quick_trainer
from rlhf.alerts import Alerts, is_spike, recent_mean
from rlhf.metrics.alert_rules import RULES
from rlhf.stage import Metrics, Result, StageModule


def series(values: str) -> list[float]:
    return [float(value) for value in values.split()]


# Rounded metrics of the first 20 PPO iterations on the bundled data with seed 1, including two spikes of the KL.
HEALTHY = {
    "objective/kl": series("0 0.5 0.8 1.7 5.6 1.1 1.3 1.1 1.5 1.3 1.8 1.7 6.0 2.4 1.6 1.9 1.5 1.4 1.6 1.9"),
    "objective/scores": series("1.0 1.3 1.8 1.9 1.9 1.9 2.0 2.0 2.1 2.1 2.1 2.1 2.2 1.9 2.1 2.2 2.1 2.1 2.2 2.1"),
    "response/length": series("20 19 17 16 17 16 17 17 17 17 17 17 19 17 17 17 17 17 17 17"),
    "response/truncated": [0.0] * 20,
    "response/repetition": [0.02] * 20,
    "policy/entropy_avg": series(
        "0.25 0.2 0.14 0.11 0.1 0.05 0.04 0.03 0.03 0.03 0.03 0.03 0.06 0.04 0.02 0.03 0.02 0.02 0.03 0.014"
    ),
    "objective/score_range": [3.0] * 20,
    "critic/explained_variance": series(
        "-4.6 -0.8 0 -0.13 0.21 0.17 0.22 0.2 0.32 0.43 0.41 0.38 0.1 0.29 0.62 0.6 0.57 0.61 0.68 0.5"
    ),
    "grad_norm": series(
        "1.2 0.53 0.42 0.29 1.2 0.34 0.29 0.15 0.14 0.1 0.17 0.29 0.95 0.43 0.28 0.23 0.14 0.12 0.15 0.34"
    ),
}
# Alert: (faulty metrics that replace the healthy ones, index of the first step at which the alert fires).
FAULTS: dict[str, tuple[dict[str, Sequence[float]], int]] = {
    # The mean of 5 exceeds 10 with the third 20: (1.3 + 1.8 + 20 + 20 + 20) / 5 = 12.6. One step earlier it is 8.9.
    "kl": ({"objective/kl": [1.3] * 10 + [1.8] + [20.0] * 9}, 13),
    # The first mean is 20. (20 + 20 + 20 + 40 + 40) / 5 = 28 is 1.4 times as much; with one more 40, 32 is 1.6 times.
    "length": ({"response/length": [20.0] * 10 + [40.0] * 10}, 12),
    # (0 + 0 + 0 + 0 + 1) / 5 = 0.2 is equal to the limit. The second 1 exceeds it.
    "repetition": ({"response/repetition": [0.0] * 10 + [1.0] * 10}, 11),
    "truncation": ({"response/truncated": [0.0] * 10 + [1.0] * 10}, 11),
    # (0.02 + 4 x 0.001) / 5 = 0.0048 is below 0.005. (2 x 0.02 + 3 x 0.001) / 5 = 0.0086 is not.
    "entropy": ({"policy/entropy_avg": [0.02] * 10 + [0.001] * 10}, 13),
    # Five zeros in a row.
    "constant_scores": ({"objective/score_range": [0.5] * 10 + [0.0] * 10}, 14),
    # The first 14 values are ignored.
    "explained_variance": ({"critic/explained_variance": [-1.0] * 20}, 14),
    # 10 times the median of 1 does not exceed the limit, 11 times does.
    "gradient_norm": ({"grad_norm": [1.0] * 12 + [10.0, 11.0] + [1.0] * 6}, 13),
}


def steps(*series: dict[str, Sequence[float]]) -> Iterable[dict[str, float]]:
    """Yield the metrics of each step. Later series replace earlier ones of the same name."""
    merged: dict[str, Sequence[float]] = {}
    for one in series:
        merged |= one
    for values in zip(*merged.values(), strict=True):
        yield dict(zip(merged, values, strict=True))


def fired(alerts: Alerts, metrics: Iterable[dict[str, float]]) -> list[set[str]]:
    """Return the names of the alerts that fire at each step."""
    return [{name for name, message in alerts.update(step).items() if message} for step in metrics]


def test_no_alert_fires_on_a_healthy_run() -> None:
    assert fired(Alerts(), steps(HEALTHY)) == [set()] * 20


@pytest.mark.parametrize("name", FAULTS)
def test_alert_fires_at_the_expected_step(name: str) -> None:
    """It fires at the step computed next to the series, not earlier, and no other alert fires with it."""
    faulty, first = FAULTS[name]
    alerts = fired(Alerts(), steps(HEALTHY, faulty))
    assert alerts[:first] == [set()] * first
    assert alerts[first] == {name}


@pytest.mark.parametrize("name", FAULTS)
def test_null_threshold_disables_an_alert(name: str) -> None:
    threshold = {
        "kl": "max_kl_per_sequence",
        "length": "max_length_growth",
        "repetition": "max_repetition_share",
        "truncation": "max_truncated_share",
        "entropy": "min_entropy_per_token",
        "constant_scores": "min_score_range",
        "explained_variance": "min_explained_variance",
        "gradient_norm": "max_gradient_norm_ratio",
    }[name]
    alerts = Alerts(**{threshold: None})
    assert fired(alerts, steps(HEALTHY, FAULTS[name][0])) == [set()] * 20
    assert name not in alerts.update({key: 1.0 for key in HEALTHY})


def test_length_alert_needs_rising_scores() -> None:
    """Longer responses with constant scores are not a sign of reward hacking."""
    constant = {"objective/scores": [1.0] * 20}
    assert fired(Alerts(), steps(HEALTHY, FAULTS["length"][0], constant)) == [set()] * 20


@pytest.mark.parametrize("name", ["objective/kl", "grad_norm", "policy/entropy_avg"])
def test_nan_fires_an_alert(name: str) -> None:
    assert fired(Alerts(), steps(HEALTHY, {name: [float("nan")] * 20}))[4] != set()


def test_an_undefined_explained_variance_fires_no_alert() -> None:
    """NaN in half of the iterations: the alert fires at the 15th defined one, at index 2 x 15 - 1 of 30."""
    undefined = [float("nan"), -1.0] * 15
    metrics = list(steps({"critic/explained_variance": undefined}))
    assert [bool(names) for names in fired(Alerts(), metrics)] == [False] * 29 + [True]


def test_every_alert_has_advice() -> None:
    assert Alerts().thresholds().keys() == RULES.keys() == FAULTS.keys()
    assert all(sentence.endswith(".") for rule in RULES.values() for sentence in (rule.meaning, rule.change))


def test_resumed_alerts_continue_where_they_stopped() -> None:
    """After step 12, the state is stored as JSON and loaded into new alerts. They fire as in an uninterrupted run."""
    metrics = list(steps(HEALTHY, FAULTS["kl"][0]))
    whole, first, second = Alerts(), Alerts(), Alerts()
    expected = fired(whole, metrics)
    before = fired(first, metrics[:12])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + fired(second, metrics[12:]) == expected
    assert second.state_dict() == whole.state_dict()


def test_recent_mean_by_hand() -> None:
    """(2 + 6) / 2 = 4. Two values are too few for a window of three."""
    assert recent_mean([100.0, 2.0, 6.0], 2) == 4.0
    assert recent_mean([2.0, 6.0], 3) is None


def test_is_spike_by_hand() -> None:
    """The median of 1, 2, 3 is 2, so with a ratio of 3 a spike is above 6. It needs a history unless it is infinite."""
    assert not is_spike([1.0, 2.0, 3.0, 6.0], 3.0, min_history=3)
    assert is_spike([1.0, 2.0, 3.0, 6.1], 3.0, min_history=3)
    assert not is_spike([1.0, 2.0, 3.0, 6.1], 3.0, min_history=4)
    assert is_spike([float("inf")], 3.0)


# In Lightning's loop


class ScaledGradient(StageModule):
    """A stage whose gradient norm is the value of its batch."""

    def __init__(self) -> None:
        super().__init__(learning_rate=NO_UPDATE, schedule="constant")
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_loss(self, batch: Tensor) -> tuple[Tensor, Metrics]:
        return (self.weight * batch).sum(), {}

    def result(self) -> Result:
        raise NotImplementedError


def train(*callbacks: Callback, gradient_norms: list[float], **trainer: Any) -> None:
    batches = DataLoader(torch.tensor(gradient_norms)[:, None], batch_size=None)
    quick_trainer(callbacks=callbacks, **trainer).fit(ScaledGradient(), batches)


def test_an_alert_warns_once_until_it_clears(caplog: pytest.LogCaptureFixture) -> None:
    """Two spikes in a row and a third one later give two warnings. The logged value is 1 at each of the three."""
    caplog.set_level(logging.WARNING, logger="rlhf")
    logger = MetricsLogger()
    train(Alerts(), gradient_norms=[1.0] * 12 + [50.0, 50.0, 1.0, 50.0, 1.0], logger=logger)
    warnings = [record.getMessage() for record in caplog.records if record.name == "rlhf.alerts"]
    assert [line.split(":")[0] for line in warnings] == [
        "alert gradient_norm at step 13",
        "alert gradient_norm at step 16",
    ]
    assert all(text in warnings[0] for text in (RULES["gradient_norm"].meaning, RULES["gradient_norm"].change))
    logged = [metrics["alerts/gradient_norm"] for metrics in logger.calls if "alerts/gradient_norm" in metrics]
    assert logged == [0.0] * 12 + [1.0, 1.0, 0.0, 1.0, 0.0]


class MetricsReader(Callback):
    """Records the gradient norm that the module reports after each batch."""

    def __init__(self) -> None:
        self.gradient_norms: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.gradient_norms.append(float(module.metrics["grad_norm"]))


def test_alerts_leave_the_metrics_to_other_callbacks() -> None:
    """A callback before the alerts and one after them see the same metrics."""
    before, after = MetricsReader(), MetricsReader()
    train(before, Alerts(), after, gradient_norms=[1.0, 2.0, 3.0])
    assert before.gradient_norms == after.gradient_norms == [1.0, 2.0, 3.0]


def test_metrics_are_read_once_per_optimizer_step() -> None:
    """With accumulation over 2 batches, the mean gradients of (1, 3) and (5, 7) are 2 and 6."""
    alerts = Alerts()
    train(alerts, gradient_norms=[1.0, 3.0, 5.0, 7.0], accumulate_grad_batches=2)
    assert alerts.recent_values["grad_norm"] == [2.0, 6.0]


def test_tensors_are_read_in_log_steps_only() -> None:
    """Reading a tensor waits for the device. With a log every 5 steps, only steps 5 and 10 are read."""
    alerts = Alerts()
    train(alerts, gradient_norms=[float(n) for n in range(1, 11)], log_every_n_steps=5)
    assert alerts.recent_values["grad_norm"] == [5.0, 10.0]


@pytest.mark.parametrize(("scaler", "fires"), [(None, True), (object(), False)])
def test_a_gradient_scaler_handles_overflows_itself(
    scaler: object, fires: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With float16, the scaler skips the step and lowers its factor."""
    module = SimpleNamespace(metrics={"grad_norm": math.inf}, metrics_step=1)
    plugin = SimpleNamespace(scaler=scaler)
    trainer = SimpleNamespace(precision_plugin=plugin, is_global_zero=True, global_step=1, loggers=[])
    Alerts()._report(trainer, module)  # type: ignore[arg-type]
    assert ("alert gradient_norm" in caplog.text) is fires
