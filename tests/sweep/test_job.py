"""What a job of a sweep returns, and what it leaves for the table."""

import copy
import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ConfigError, Stopped, TrainingError
from rlhf.sweep import Monitored, run_job
from rlhf.sweep.job import Job


def test_a_monitored_metric_is_a_number() -> None:
    """A launcher may send it to another process."""
    metric = Monitored(0.5, "val/loss")
    assert metric == 0.5
    assert metric + 1 == 1.5
    for same in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert (same, same.name) == (0.5, "val/loss")


def test_a_job_leaves_its_metric(tmp_path: Path) -> None:
    assert run_job(lambda: Monitored(0.5, "val/loss"), tmp_path, ["loss=ipo"]) == 0.5
    job = Job.read(tmp_path / "job.json")
    assert job is not None
    assert (job.overrides, job.metric, job.value, job.error, job.exit_code) == (["loss=ipo"], "val/loss", 0.5, "", 0)
    assert job.lower_is_better
    assert not Job([], "val/rewards/accuracies").lower_is_better


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (ConfigError("stage.beta must be positive.", "Set stage.beta=0.3."), "stage.beta must be positive.\n  Set", 2),
        (TrainingError("The loss is NaN."), "The loss is NaN.", 1),
        (RuntimeError("a bug"), "RuntimeError: a bug", 1),
    ],
)
def test_a_failed_job_returns_nan(
    tmp_path: Path, error: Exception, message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user error is shown as a message, a bug with its traceback."""

    def fail() -> float:
        raise error

    assert math.isnan(run_job(fail, tmp_path, []))
    job = Job.read(tmp_path / "job.json")
    assert job is not None
    assert job.error.startswith(message)
    assert (job.exit_code, job.value) == (code, None)
    assert ("Traceback" in capsys.readouterr().err) is isinstance(error, RuntimeError)


def test_a_command_that_finds_errors_is_a_failed_job(tmp_path: Path) -> None:
    """``stage=doctor`` exits with 1, and the sweep goes on with the next file."""
    assert math.isnan(run_job(lambda: sys.exit(1), tmp_path, []))
    job = Job.read(tmp_path / "job.json")
    assert job is not None
    assert (job.exit_code, job.error) == (1, "exit code 1")


def test_a_signal_ends_the_whole_sweep(tmp_path: Path) -> None:
    def stop() -> float:
        raise Stopped("stopped", exit_code=130)

    with pytest.raises(Stopped):
        run_job(stop, tmp_path, [])
    assert not (tmp_path / "job.json").exists()


def test_a_metric_that_is_nan_is_none_in_json(tmp_path: Path) -> None:
    run_job(lambda: float("nan"), tmp_path, [])
    assert json.loads((tmp_path / "job.json").read_text())["value"] is None


@pytest.mark.parametrize("content", ["", "[]", '{"overrides": [], "other": 1}', "{}"])
def test_another_file_is_no_job(tmp_path: Path, content: Any) -> None:
    (tmp_path / "job.json").write_text(content)
    assert Job.read(tmp_path / "job.json") is None
