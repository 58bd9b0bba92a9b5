"""Alerts: each sounds on a series made for it, once, and stays silent on a healthy run."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rlhf.alerts import ADVICE, Alerts, recent_mean, spikes
from rlhf.sampling import repeated_ngram_fraction
from rlhf.stage import Result, StageModule

# the first 20 iterations of PPO on the shipped data, seed 1, rounded; the two excursions of its KL are left in
HEALTHY = {
    "objective/kl": [0, 0.5, 0.8, 1.7, 5.6, 1.1, 1.3, 1.1, 1.5, 1.3, 1.8, 1.7, 6.0, 2.4, 1.6, 1.9, 1.5, 1.4, 1.6, 1.9],
    "objective/scores": [
        1.0,
        1.3,
        1.8,
        1.9,
        1.9,
        1.9,
        2.0,
        2.0,
        2.1,
        2.1,
        2.1,
        2.1,
        2.2,
        1.9,
        2.1,
        2.2,
        2.1,
        2.1,
        2.2,
        2.1,
    ],
    "response/length": [20, 19, 17, 16, 17, 16, 17, 17, 17, 17, 17, 17, 19, 17, 17, 17, 17, 17, 17, 17],
    "response/truncated": [0.0] * 20,
    "response/repetition": [0.02] * 20,
    "policy/entropy_avg": [
        0.25,
        0.2,
        0.14,
        0.11,
        0.1,
        0.05,
        0.04,
        0.03,
        0.03,
        0.03,
        0.03,
        0.03,
        0.06,
        0.04,
        0.02,
        0.03,
        0.02,
        0.02,
        0.03,
        0.014,
    ],
    "critic/explained_variance": [
        -4.6,
        -0.8,
        0,
        -0.13,
        0.21,
        0.17,
        0.22,
        0.2,
        0.32,
        0.43,
        0.41,
        0.38,
        0.1,
        0.29,
        0.62,
        0.6,
        0.57,
        0.61,
        0.68,
        0.5,
    ],
    "grad_norm": [
        1.2,
        0.53,
        0.42,
        0.29,
        1.2,
        0.34,
        0.29,
        0.15,
        0.14,
        0.1,
        0.17,
        0.29,
        0.95,
        0.43,
        0.28,
        0.23,
        0.14,
        0.12,
        0.15,
        0.34,
    ],
}
# name: (what goes wrong in place of the healthy numbers, the first entry at which that is seen)
FAULTS: dict[str, tuple[dict[str, Sequence[float]], int]] = {
    # the mean of 5 rises above 10 with the third 20: (1.3 + 1.8 + 20 + 20 + 20) / 5 = 12.6, before it 8.7
    "kl": ({"objective/kl": [1.3] * 10 + [1.8] + [20.0] * 9}, 13),
    # from a mean of 20: (20 + 20 + 20 + 40 + 40) / 5 = 28 is 1.4 times, with one more 40 it is 32, 1.6 times
    "length": ({"response/length": [20.0] * 10 + [40.0] * 10}, 12),
    # (0 + 0 + 0 + 0 + 1) / 5 = 0.2 is the limit itself, with the second it is above
    "repetition": ({"response/repetition": [0.0] * 10 + [1.0] * 10}, 11),
    "truncation": ({"response/truncated": [0.0] * 10 + [1.0] * 10}, 11),
    # (0.02 + 4 x 0.001) / 5 = 0.0048 is below 0.005, (2 x 0.02 + 3 x 0.001) / 5 = 0.0086 is not
    "entropy": ({"policy/entropy_avg": [0.02] * 10 + [0.001] * 10}, 13),
    # judged from the 15th number on, however bad it was before
    "explained_variance": ({"critic/explained_variance": [-1.0] * 20}, 14),
    # 10 times the median of 1 is not above it, 11 times is
    "gradient_norm": ({"grad_norm": [1.0] * 12 + [10.0, 11.0] + [1.0] * 6}, 13),
}


def steps(*series: dict[str, Sequence[float]]) -> Iterable[dict[str, float]]:
    """The numbers of each step; of several series with one name the last counts."""
    merged: dict[str, Sequence[float]] = {}
    for one in series:
        merged |= one
    for values in zip(*merged.values(), strict=True):
        yield dict(zip(merged, values, strict=True))


def heard(alarms: Alerts, numbers: Iterable[dict[str, float]]) -> list[set[str]]:
    """Which alarms sound at each step."""
    return [{name for name, seen in alarms.hear(step).items() if seen} for step in numbers]


def test_a_healthy_run_is_silent() -> None:
    assert heard(Alerts(), steps(HEALTHY)) == [set()] * 20


@pytest.mark.parametrize("name", FAULTS)
def test_an_alarm_sounds_when_it_should(name: str) -> None:
    """At the step worked out beside the series, not before it, and no other alarm with it."""
    series, first = FAULTS[name]
    said = heard(Alerts(), steps(HEALTHY, series))
    assert said[:first] == [set()] * first
    assert said[first] == {name}


@pytest.mark.parametrize("name", FAULTS)
def test_null_switches_an_alarm_off(name: str) -> None:
    switch = {
        "kl": "max_kl_per_sequence",
        "length": "max_length_growth",
        "repetition": "max_repetition_share",
        "truncation": "max_truncated_share",
        "entropy": "min_entropy_per_token",
        "explained_variance": "min_explained_variance",
        "gradient_norm": "max_gradient_norm_ratio",
    }[name]
    off = Alerts(**{switch: None})
    assert heard(off, steps(HEALTHY, FAULTS[name][0])) == [set()] * 20
    assert name not in off.hear({key: 1.0 for key in HEALTHY})


def test_longer_answers_alone_are_no_alarm() -> None:
    """Where the score does not rise, length is no sign of reward hacking."""
    flat = {"objective/scores": [1.0] * 20}
    assert heard(Alerts(), steps(HEALTHY, FAULTS["length"][0], flat)) == [set()] * 20


@pytest.mark.parametrize("name", ["objective/kl", "grad_norm", "policy/entropy_avg"])
def test_what_is_no_number_is_an_alarm(name: str) -> None:
    assert heard(Alerts(), steps(HEALTHY, {name: [float("nan")] * 20}))[4] != set()


def test_every_alarm_has_advice() -> None:
    assert Alerts().watched().keys() == ADVICE.keys() == FAULTS.keys()


def test_a_resumed_run_goes_on_with_what_it_knew() -> None:
    """Cut after the 12th step and carried over by a checkpoint, which holds plain numbers only."""
    series = list(steps(HEALTHY, FAULTS["kl"][0]))
    whole, first, second = Alerts(), Alerts(), Alerts()
    expected = heard(whole, series)
    begun = heard(first, series[:12])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + heard(second, series[12:]) == expected
    assert second.state_dict() == whole.state_dict()


def test_recent_mean_by_hand() -> None:
    """(2 + 6) / 2 = 4; two values are not three."""
    assert recent_mean([100.0, 2.0, 6.0], 2) == 4.0
    assert recent_mean([2.0, 6.0], 3) is None


def test_spikes_by_hand() -> None:
    """The median of 1 2 3 is 2: above 3 times it is above 6. Too few to judge, unless it is no number."""
    assert not spikes([1.0, 2.0, 3.0, 6.0], 3.0, early=3)
    assert spikes([1.0, 2.0, 3.0, 6.1], 3.0, early=3)
    assert not spikes([1.0, 2.0, 3.0, 6.1], 3.0, early=4)
    assert spikes([float("inf")], 3.0)


def test_repeated_share_by_hand() -> None:
    """Runs of 2 of 1 2 1 2 1: 12 21 12 21, two of four are new; of 5 6 7: 56 67, both are new. 1 - 4 / 6 = 1 / 3.

    An answer shorter than a run says nothing.
    """
    assert repeated_ngram_fraction([[1, 2, 1, 2, 1], [5, 6, 7], [9]], 2) == pytest.approx(1 / 3)
    assert repeated_ngram_fraction([[9], []], 2) == 0.0
    assert repeated_ngram_fraction([[4] * 10]) == pytest.approx(1 - 1 / 7)


# in Lightning's loop


class Tiny(StageModule):
    """Its loss, and so its gradient, is as large as its data say."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0, schedule="constant")
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).sum()

    def result(self) -> Result:
        raise NotImplementedError


class Memory(lightning.pytorch.loggers.logger.Logger):
    """Keeps what was logged."""

    name, version = "memory", "0"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step or 0, dict(metrics)))

    def log_hyperparams(self, *args: Any, **keys: Any) -> None:
        """Nothing."""


def test_an_alarm_is_told_once_until_it_has_cleared(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Gradients of 1, two spikes beside each other, and a third later: two warnings, and a 1 at each of the three."""
    caplog.set_level(logging.WARNING, logger="rlhf")
    sizes = torch.tensor([1.0] * 12 + [50.0, 50.0, 1.0, 50.0, 1.0])[:, None]
    memory = Memory()
    lightning.Trainer(
        accelerator="cpu",
        logger=memory,
        enable_checkpointing=False,
        enable_progress_bar=False,
        max_epochs=1,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[Alerts()],
    ).fit(Tiny(), DataLoader(sizes, batch_size=None))
    warnings = [record.getMessage() for record in caplog.records if record.name == "rlhf.alerts"]
    assert [line.split(":")[0] for line in warnings] == [
        "alarm gradient_norm at step 13",
        "alarm gradient_norm at step 16",
    ]
    assert ADVICE["gradient_norm"] in warnings[0]
    rang = [numbers["alerts/gradient_norm"] for _, numbers in memory.seen if "alerts/gradient_norm" in numbers]
    assert rang == [0.0] * 12 + [1.0, 1.0, 0.0, 1.0, 0.0]


def test_a_step_that_is_not_logged_is_not_waited_for() -> None:
    """With a log every 5 steps, tensors are read in those steps only."""
    alarms = Alerts()
    lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        max_epochs=1,
        enable_model_summary=False,
        log_every_n_steps=5,
        callbacks=[alarms],
    ).fit(Tiny(), DataLoader(torch.arange(1.0, 11.0)[:, None], batch_size=None))
    assert alarms.last["grad_norm"] == [5.0, 10.0]
