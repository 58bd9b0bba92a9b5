"""Checkpoints resume training exactly, are written atomically, and survive SIGTERM and Ctrl-C."""

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins import TorchCheckpointIO

from contract.configs import compose_config
from forked import kill_group, run_python, start_python
from harness import (
    DEMONSTRATIONS,
    EXACT,
    TINY_DATA,
    TINY_MODEL,
    Run,
    TinyRun,
    assert_same_weights,
    run_train,
    train_command,
)
from rlhf.checkpoint import AtomicCheckpointIO, RunCheckpoint, callback
from rlhf.checkpoint.signals import report_signals
from rlhf.errors import ConfigError, Stopped, TrainingError, explain
from rlhf.rl.collector import Collector

# Resumed runs write to another directory, so that the checkpoints of the first run stay as they are.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

# 4 minibatches per iteration: 2 passes over 4 responses in minibatches of 2.
STAGE_KEYS: dict[str, dict[str, Any]] = {"sft": {"samples": 2}, "ppo": {"ppo_epochs": 2, "minibatch_size": 2}}
BATCH_SIZE = {"sft": 2, "ppo": 4}


class CheckpointedRuns:
    """Runs of two epochs with validation: SFT with 4 batches per epoch, PPO with 2 iterations per epoch.

    Args:
        tiny_run: Builds the runs.
        folder: Checkpoints are written to directories in it.
    """

    def __init__(self, tiny_run: TinyRun, folder: Path) -> None:
        self.tiny_run, self.folder = tiny_run, folder
        self.rows = tiny_run.write("rows", DEMONSTRATIONS)

    @property
    def last(self) -> Path:
        """The checkpoint that ``callback()`` writes."""
        return self.folder / "run" / "last.ckpt"

    def fit(
        self,
        stage: str,
        *callbacks: lightning.Callback,
        resume: Path | None = None,
        trainer: dict[str, Any] | None = None,
        schedule: str = "cosine",
        batch_size: int | None = None,
    ) -> Run:
        """Train, from the same weights and seed in every call."""
        run = self.tiny_run.build(
            stage,
            data={
                "train": self.rows,
                "val": self.rows,
                "max_length": 64,
                "batch_size": batch_size or BATCH_SIZE[stage],
            },
            trainer={"max_epochs": 2, "enable_checkpointing": bool(callbacks), **(trainer or {})},
            callbacks=callbacks,
            schedule=schedule,
            **STAGE_KEYS[stage],
        )
        with report_signals(run.trainer):
            return run.fit(resume)

    def callback(self, directory: str = "run", **keys: Any) -> RunCheckpoint:
        """Build the checkpoint callback of ``conf/callbacks/default.yaml`` with other keys."""
        configured = compose_config("stage=sft").callbacks.checkpoint
        callback: RunCheckpoint = instantiate(configured, **{"dirpath": str(self.folder / directory), **keys})
        return callback


@pytest.fixture
def runs(tiny_run: TinyRun, tmp_path: Path) -> CheckpointedRuns:
    return CheckpointedRuns(tiny_run, tmp_path)


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference to checkpoints: one is enough."""
    return "transformer"


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A copy of every ``last.ckpt``, in the order of writing."""
    found: list[Path] = []
    write = AtomicCheckpointIO.save_checkpoint

    def save_and_copy(self: AtomicCheckpointIO, content: Any, path: Any, storage_options: Any = None) -> None:
        write(self, content, path, storage_options)
        if Path(path).name == "last.ckpt":
            (tmp_path / "copies").mkdir(exist_ok=True)
            found.append(tmp_path / "copies" / f"{len(found)}.ckpt")
            shutil.copy(path, found[-1])

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save_and_copy)
    return found


@pytest.fixture
def _receive_signals() -> Iterator[None]:
    """Receive SIGINT and SIGUSR1 during a test, and restore their handlers afterwards.

    A shell starts background jobs with SIGINT ignored, and Lightning ignores it after the first one.
    """
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGUSR1: signal.SIG_DFL}
    handlers = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def step_of(path: Path) -> int:
    """Return the optimizer step of a checkpoint."""
    step: int = torch.load(path, weights_only=True)["global_step"]
    return step


# When checkpoints are written, and what they contain


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_checkpoints_do_not_affect_training(runs: CheckpointedRuns, copies: list[Path], stage: str) -> None:
    """The weights are bit-for-bit equal without checkpoints and with one at every possible position."""
    without = runs.fit(stage)
    often = runs.fit(stage, runs.callback(every_n_minutes=0))
    assert len(copies) >= 4
    assert_same_weights(often.module, without.module, **EXACT)


@pytest.mark.parametrize(
    ("stage", "keys", "steps"),
    [
        ("sft", {}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ("sft", {"accumulate_grad_batches": 2}, [1, 2, 3, 4]),
        ("sft", {"val_check_interval": 2}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ("sft", {"limit_train_batches": 3, "val_check_interval": 3}, [1, 2, 3, 4, 5, 6]),
        ("ppo", {}, [4, 8, 12, 16]),
        ("ppo", {"limit_train_batches": 6}, [4, 6, 10, 12]),
        ("ppo", {"accumulate_grad_batches": 2}, [2, 4, 6, 8]),
        ("ppo", {"val_check_interval": 2}, [4, 8, 12, 16]),
    ],
)
def test_every_checkpoint_resumes_exactly(
    runs: CheckpointedRuns, copies: list[Path], stage: str, keys: dict[str, Any], steps: list[int]
) -> None:
    """A new module and Trainer that resume from a checkpoint end with the weights of the uninterrupted run.

    ``steps`` are the positions of the checkpoints: every optimizer step in SFT, the ends of iterations in PPO.
    """
    whole = runs.fit(stage, runs.callback(every_n_minutes=0), trainer=keys)
    assert [step_of(path) for path in copies] == steps
    middle = len(steps) // 2
    # All of the plain run; of the others, the first one, that of the end of the first epoch, and the next one.
    for path in [copies[0], *copies[middle - 1 : middle + 1]] if keys else list(copies):
        resumed = runs.fit(stage, runs.callback("resumed"), resume=path, trainer=keys)
        assert resumed.trainer.global_step == steps[-1]
        assert_same_weights(resumed.module, whole.module, **EXACT)


class Stop(lightning.Callback):
    """Requests the end of training in a batch, as a time limit does, or after its validation, as early stopping."""

    def __init__(self, batch: int, hook: str = "on_train_batch_end") -> None:
        self.batch = batch
        setattr(self, hook, self.stop)

    def stop(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch and not trainer.sanity_checking:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("stage", "keys", "stop", "step"),
    [
        ("sft", {}, {"max_steps": 3}, 3),
        ("sft", {}, {"max_steps": 7}, 7),
        ("sft", {"val_check_interval": 2}, {"max_steps": 6}, 6),
        ("sft", {"accumulate_grad_batches": 2}, {"max_steps": 3}, 3),
        ("sft", {}, Stop(1), 2),
        ("sft", {"accumulate_grad_batches": 2}, Stop(0), 1),
        ("sft", {"accumulate_grad_batches": 3}, Stop(3), 2),
        ("sft", {"val_check_interval": 3}, Stop(2, "on_validation_end"), 3),
        ("sft", {"accumulate_grad_batches": 2, "val_check_interval": 3}, Stop(2, "on_validation_end"), 2),
        ("ppo", {"val_check_interval": 3}, Stop(2, "on_validation_end"), 4),
        ("ppo", {}, {"max_steps": 4}, 4),
        ("ppo", {"limit_train_batches": 6}, Stop(5), 6),
        ("ppo", {}, Stop(9), 12),
    ],
)
def test_a_run_that_has_ended_within_an_epoch_can_be_extended(
    runs: CheckpointedRuns, stage: str, keys: dict[str, Any], stop: Any, step: int
) -> None:
    """It continues as if it had not ended. A time limit ends it after an optimizer step, and in PPO after a rollout."""
    whole = runs.fit(stage, trainer=keys, schedule="constant")
    limits, callbacks = ({}, [stop]) if isinstance(stop, Stop) else (stop, [])
    ended = runs.fit(stage, runs.callback(), *callbacks, trainer={**keys, **limits}, schedule="constant")
    assert (ended.trainer.global_step, step_of(runs.last)) == (step, step)
    resumed = runs.fit(stage, resume=runs.last, trainer=keys, schedule="constant")
    assert resumed.trainer.global_step == whole.trainer.global_step
    assert_same_weights(resumed.module, whole.module, **EXACT)


@pytest.mark.parametrize(
    ("stage", "size", "per_step", "steps"),
    [("sft", 1, 1, 8 + 6), ("sft", 4, 1, 2 + 2), ("sft", 1, 2, 4 + 3), ("ppo", 2, 1, 4 + 8), ("ppo", 8, 1, 8 + 8)],
)
def test_an_epoch_continues_with_batches_of_another_size(
    runs: CheckpointedRuns, copies: list[Path], stage: str, size: int, per_step: int, steps: int
) -> None:
    """The first checkpoint is after a quarter of the first epoch in SFT, and after half of it in PPO.

    The steps that are left take the learning rate from where it was down to 0.
    """
    runs.fit(stage, runs.callback(every_n_minutes=0))
    before = step_of(copies[0])
    seen: list[int] = []
    validated = lightning.pytorch.callbacks.LambdaCallback(
        on_validation_end=lambda trainer, module: seen.append(trainer.global_step)
    )
    rates: list[float] = []
    stepped = lightning.pytorch.callbacks.LambdaCallback(
        on_before_optimizer_step=lambda trainer, module, optimizer: rates.append(optimizer.param_groups[0]["lr"])
    )
    flags = {"accumulate_grad_batches": per_step, "max_epochs": 2}
    callbacks = runs.callback("resumed"), validated, stepped
    resumed = runs.fit(stage, *callbacks, resume=copies[0], trainer=flags, batch_size=size)
    assert resumed.trainer.global_step == before + steps
    assert len(seen) == 2
    (group,) = torch.load(copies[0], weights_only=True)["optimizer_states"][0]["param_groups"][:1]
    assert rates[0] == pytest.approx(group["lr"])
    assert rates == sorted(rates, reverse=True)
    assert resumed.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_every_checkpoint_continues_the_learning_rates(
    runs: CheckpointedRuns, copies: list[Path], caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    """Within an epoch, at the end of one, and with validation in between: the steps that are left are counted alike."""
    flags = {"val_check_interval": 2 if stage == "sft" else 4}
    whole = runs.fit(stage, runs.callback(every_n_minutes=0), trainer=flags)
    for checkpoint_path in copies:
        resumed = runs.fit(stage, resume=checkpoint_path, trainer=flags)
        assert resumed.trainer.global_step == whole.trainer.global_step
    assert "learning rate schedule" not in caplog.text


def test_the_rest_of_a_rollout_is_not_used_after_the_end_of_training(runs: CheckpointedRuns) -> None:
    """Of 16 steps, two are left of the first rollout when training ends at step 2."""
    runs.fit("ppo", runs.callback(), trainer={"max_steps": 2})
    steps: list[int] = []
    validated = lightning.pytorch.callbacks.LambdaCallback(
        on_validation_end=lambda trainer, module: steps.append(trainer.global_step)
    )
    resumed = runs.fit("ppo", validated, resume=runs.last)
    assert resumed.trainer.global_step == 14
    assert steps[-2:] == [6, 14], "the ends of the epochs"


class Fault(lightning.Callback):
    """Raises an error in a hook when it is called for the n-th time, after drawing random numbers."""

    def __init__(self, hook: str, count: int) -> None:
        self.remaining = count
        setattr(self, hook, self.fail)

    def fail(self, *_: Any, **__: Any) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            torch.rand(3)
            raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("stage", "keys", "hook", "count", "step"),
    [
        ("sft", {}, "on_train_batch_start", 3, 2),
        ("sft", {}, "on_before_backward", 3, 2),
        ("sft", {}, "on_after_backward", 7, 6),
        ("sft", {"accumulate_grad_batches": 2}, "on_after_backward", 4, 1),  # in the second batch of the second step
        ("ppo", {}, "score", 2, 4),  # in the second rollout
        ("ppo", {}, "on_train_batch_start", 9, 8),
        ("ppo", {"accumulate_grad_batches": 2}, "on_after_backward", 9, 4),
    ],
)
def test_a_failure_writes_a_checkpoint_that_resumes_exactly(
    runs: CheckpointedRuns,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    keys: dict[str, Any],
    hook: str,
    count: int,
    step: int,
) -> None:
    """The checkpoint is that of the last position from which a run can be resumed, before the step that failed."""
    whole = runs.fit(stage, runs.callback("whole", every_n_minutes=None), trainer=keys)
    fault, score = Fault(hook, count), Collector.score
    with monkeypatch.context() as patch:
        if hook == "score":
            patch.setattr(Collector, "score", lambda *arguments: (fault.fail(), score(*arguments))[1])
        with pytest.raises(RuntimeError, match="a bug"):
            runs.fit(stage, runs.callback(every_n_minutes=None), fault, trainer=keys)
    assert step_of(runs.last) == step
    resumed = runs.fit(stage, runs.callback("resumed"), resume=runs.last, trainer=keys)
    assert_same_weights(resumed.module, whole.module, **EXACT)


class NanGradient(lightning.Callback):
    """Makes the gradient of the n-th batch NaN."""

    def __init__(self, count: int) -> None:
        self.remaining = count

    def on_after_backward(self, trainer: lightning.Trainer, module: Any) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            next(parameter for parameter in module.parameters() if parameter.grad is not None).grad.fill_(math.nan)


@pytest.mark.parametrize(("stage", "count", "step"), [("sft", 3, 2), ("ppo", 5, 4)])
def test_a_step_that_is_not_finite_leaves_a_checkpoint_of_the_step_before(
    runs: CheckpointedRuns, stage: str, count: int, step: int
) -> None:
    """In PPO, the fifth minibatch is the first one of the second rollout."""
    whole = runs.fit(stage, runs.callback("whole", every_n_minutes=None))
    with pytest.raises(TrainingError, match=rf"optimizer step {step + 1}: .* The weights have not been changed\."):
        runs.fit(stage, runs.callback(every_n_minutes=None), NanGradient(count))
    assert step_of(runs.last) == step
    resumed = runs.fit(stage, runs.callback("resumed"), resume=runs.last)
    assert_same_weights(resumed.module, whole.module, **EXACT)


@pytest.mark.parametrize(("stage", "count"), [("sft", 1), ("ppo", 2), ("ppo", 6)])
def test_a_failure_elsewhere_writes_no_checkpoint(runs: CheckpointedRuns, stage: str, count: int) -> None:
    """Before the first step there is nothing to save. Within a PPO iteration, the weights have changed."""
    with pytest.raises(RuntimeError, match="a bug"):
        runs.fit(stage, runs.callback(every_n_minutes=None), Fault("on_after_backward", count))
    assert not runs.last.exists()


def test_a_checkpoint_is_written_every_five_minutes(
    runs: CheckpointedRuns, copies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch takes 2 minutes of a fake clock. A third one after a checkpoint would exceed the 5 minutes.

        batch     1  2  3  4 |  5   6   7   8    (| is the end of the first epoch)
        minute    0  2  4  6 |  8  10  12  14
        written         4  6       10      14    the last one at the end of training

    With ``every_n_minutes=None``, only the ends of the two epochs remain.
    """
    minutes = iter(range(0, 10_000, 2))
    now = [0]

    class Clock(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            now[0] = 60 * next(minutes)

    monkeypatch.setattr(callback.time, "monotonic", lambda: float(now[0]))
    runs.fit("sft", Clock(), runs.callback(), trainer={"val_check_interval": 1.0})
    assert runs.callback().every_n_minutes == 5.0
    assert [step_of(path) for path in copies] == [3, 4, 6, 8]
    copies.clear()
    runs.fit("sft", runs.callback(every_n_minutes=None))
    assert [step_of(path) for path in copies] == [4, 8]


@pytest.mark.parametrize(
    ("stage", "every", "expected"), [("sft", 3, [3, 6]), ("ppo", 4, [4, 8, 12, 16]), ("ppo", 6, [8, 12])]
)
def test_numbered_checkpoints_are_kept(runs: CheckpointedRuns, stage: str, every: int, expected: list[int]) -> None:
    """As ``experiment=overoptimization`` sets it. In PPO, a checkpoint due within an iteration waits for its end."""
    runs.fit(stage, runs.callback(every_n_train_steps=every, save_top_k=-1))
    found = sorted(int(path.stem.removeprefix("step")) for path in runs.last.parent.glob("step*.ckpt"))
    assert found == expected
    assert all(step_of(runs.last.with_name(f"step{step}.ckpt")) == step for step in found)
    assert runs.last.is_file()


@pytest.mark.parametrize(
    ("stage", "interval", "keys", "expected"),
    [
        ("sft", 2, {"mode": "max", "save_top_k": 1}, [2]),
        ("sft", 2, {"save_top_k": 2}, [6, 8]),
        ("sft", 2, {"save_top_k": -1, "every_n_train_steps": 3}, [4, 6]),
        ("sft", 1.0, {"save_top_k": -1, "every_n_epochs": 2}, [8]),
        ("ppo", 4, {"save_top_k": -1}, [4, 8, 12, 16]),
    ],
)
def test_the_monitored_metric_is_that_of_the_weights(
    runs: CheckpointedRuns, stage: str, interval: float, keys: dict[str, Any], expected: list[int]
) -> None:
    """The loss of validation falls at each validation of SFT. Numbered checkpoints are written after validations."""
    monitor = "val/loss" if stage == "sft" else "val/score"
    values: dict[int, float] = {}
    recorded = lightning.pytorch.callbacks.LambdaCallback(
        on_validation_end=lambda trainer, module: values.update(
            {trainer.global_step: float(trainer.callback_metrics[monitor])}
        )
    )
    callback = runs.callback(monitor=monitor, **keys)
    runs.fit(stage, recorded, callback, trainer={"val_check_interval": interval})
    found = sorted(runs.last.parent.glob("step*.ckpt"), key=step_of)
    assert [step_of(path) for path in found] == expected
    assert {step_of(Path(path)): float(value) for path, value in callback.best_k_models.items()} == {
        step: values[step] for step in expected
    }


@pytest.mark.parametrize("monitor", ["val/los", "val_loss"])
def test_a_monitored_metric_that_does_not_exist_is_rejected(runs: CheckpointedRuns, monitor: str) -> None:
    """At the first validation, which shows the names of the metrics."""
    message = (
        r"^callbacks\.checkpoint\.monitor must be a metric of validation \(val/loss, val/token_accuracy\), "
        rf"got {monitor}\.\n  Set callbacks\.checkpoint\.monitor=val/loss\.$"
    )
    callback = runs.callback(monitor=monitor, save_top_k=1)
    with pytest.raises(ConfigError, match=message):
        runs.fit("sft", callback)


def test_a_monitor_by_which_nothing_is_kept_is_rejected() -> None:
    """``conf/callbacks/default.yaml`` keeps no numbered checkpoints."""
    cfg = compose_config("stage=sft", "callbacks.checkpoint.monitor=val/loss")
    with pytest.raises(InstantiationException) as error:
        instantiate(cfg.callbacks.checkpoint)
    assert explain(error.value) == (
        "callbacks.checkpoint.monitor=val/loss has no effect with callbacks.checkpoint.save_top_k=0, which keeps no "
        "numbered checkpoint.\n  Set callbacks.checkpoint.save_top_k=1."
    )


class Sometimes(lightning.Callback):
    """Logs a metric at the given validations only, counted from 1."""

    def __init__(self, *validations: int) -> None:
        self.validations, self.count = validations, 0

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.count += 1
        if self.count in self.validations:
            pl_module.log("val/sometimes", float(self.count))


def test_a_monitored_metric_may_be_logged_at_some_validations(
    runs: CheckpointedRuns, caplog: pytest.LogCaptureFixture
) -> None:
    """A resumed run need not log it at its first validation, either."""
    keys: dict[str, Any] = {"monitor": "val/sometimes", "save_top_k": -1}
    runs.fit("sft", Sometimes(1), runs.callback(**keys))
    runs.fit("sft", Sometimes(2), runs.callback(**keys), resume=runs.last, trainer={"max_epochs": 4})
    assert step_of(min(runs.last.parent.glob("step*.ckpt"), key=step_of)) == 4
    assert "has no effect" not in caplog.text


@pytest.mark.parametrize(
    ("monitor", "reason"),
    [("val/loss", "there was no validation"), ("train/typo", "training has logged no such metric")],
)
def test_a_monitored_metric_that_is_not_logged_gives_a_warning(
    runs: CheckpointedRuns, caplog: pytest.LogCaptureFixture, monitor: str, reason: str
) -> None:
    runs.fit("sft", runs.callback(monitor=monitor, save_top_k=1), trainer={"limit_val_batches": 0})
    assert caplog.text.count(f"callbacks.checkpoint.monitor={monitor} has no effect: {reason}") == 1
    assert runs.last.is_file()


@pytest.mark.parametrize(
    "keys", [{"train_time_interval": timedelta(minutes=1)}, {"save_weights_only": True}, {"save_last": "link"}]
)
def test_keywords_that_contradict_resuming_are_rejected(keys: dict[str, Any]) -> None:
    (key,) = keys
    with pytest.raises(ConfigError, match=rf"^callbacks\.checkpoint\.{key}=.* is not supported: "):
        RunCheckpoint(**keys)


def test_the_configuration_selects_the_callback() -> None:
    """The default, and the keys of the experiment that the overoptimization benchmark relies on."""
    assert compose_config("stage=sft").callbacks.checkpoint._target_ == "rlhf.checkpoint.RunCheckpoint"
    keys = compose_config("experiment=overoptimization").callbacks.checkpoint
    assert (keys.every_n_train_steps, keys.save_top_k, keys.filename) == (12, -1, "step{step}")


@pytest.mark.parametrize("minutes", [-1, float("nan")])
def test_a_negative_interval_is_rejected(minutes: float) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^callbacks\.checkpoint\.every_n_minutes must be a number of at least 0 or null, got {minutes}\.",
    ):
        RunCheckpoint(every_n_minutes=minutes)


def test_fast_dev_run_writes_no_checkpoint(runs: CheckpointedRuns) -> None:
    runs.fit("sft", runs.callback(every_n_minutes=0), trainer={"fast_dev_run": True})
    assert not runs.last.parent.exists()


# How a file is written


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file is written under a temporary name in the same directory, and renamed only when it is complete."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    names = []

    def fill_the_disk(content: Any, file: Any) -> None:
        file.write(b"incomplete")
        names.extend(sorted(found.name for found in tmp_path.iterdir()))
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill_the_disk)
        with pytest.raises(OSError, match="no space"):
            AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert names == ["last.ckpt", "last.ckpt.part"]
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"step": 1}


# Writes a checkpoint, then kills its own process in the middle of writing a second one.
KILLED_WHILE_WRITING = """
import os, signal, sys, torch
from rlhf.checkpoint import AtomicCheckpointIO
AtomicCheckpointIO().save_checkpoint({"step": 1}, sys.argv[1])
def write_and_die(content, file):
    file.write(b"incomplete"); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = write_and_die
AtomicCheckpointIO().save_checkpoint({"step": 2}, sys.argv[1])
"""


def test_a_process_killed_while_writing_keeps_the_previous_checkpoint(repo: Path, runs: CheckpointedRuns) -> None:
    """The next run removes the incomplete file, even if it writes no checkpoint of that name."""
    path = runs.last
    done = run_python(["-c", KILLED_WHILE_WRITING, str(path)], repo)
    assert done.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert path.with_name("last.ckpt.part").is_file()
    path.with_name("last.ckpt.part").rename(path.with_name("step3.ckpt.part"))
    runs.fit("sft", runs.callback(), trainer={"max_epochs": 1})
    assert [found.name for found in path.parent.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_io_in_trainer_plugins_is_used(runs: CheckpointedRuns) -> None:
    class CountingCheckpointIO(TorchCheckpointIO):
        written = 0

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            CountingCheckpointIO.written += 1
            super().save_checkpoint(*args, **kwargs)

    runs.fit("sft", runs.callback(), trainer={"max_epochs": 1, "plugins": [CountingCheckpointIO()]})
    assert CountingCheckpointIO.written == 1


# Signals


class SendSignal(lightning.Callback):
    """Sends a signal to this process when a hook is called for the given time.

    Args:
        call: Number of the call, counted from 1 over all epochs.
        number: The signal.
        hook: Name of the hook.
    """

    def __init__(self, call: int, number: signal.Signals, hook: str = "on_train_batch_start") -> None:
        self.calls, self.call, self.number = 0, call, number
        setattr(self, hook, self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.call:
            signal.raise_signal(self.number)


@pytest.mark.parametrize(
    ("stage", "batch", "keys", "step", "saved"),
    [
        ("sft", 3, {}, 3, 3),  # After any optimizer step
        ("sft", 3, {"accumulate_grad_batches": 2}, 1, None),  # In the middle of an accumulation
        ("ppo", 2, {}, 2, None),  # Within the first iteration
        ("ppo", 6, {}, 6, None),  # Within the second iteration
        ("ppo", 4, {}, 4, 4),  # At the end of an iteration
        ("ppo", 10, {}, 10, 8),  # Within the third iteration, which follows the checkpoint of the first epoch's end
        ("ppo", 16, {"limit_val_batches": 0}, 16, 16),  # After the last batch
    ],
)
def test_sigterm_saves_a_checkpoint_where_resuming_is_exact(
    runs: CheckpointedRuns,
    stage: str,
    batch: int,
    keys: dict[str, Any],
    step: int,
    saved: int | None,
) -> None:
    """The message contains the step that was reached and the step of the checkpoint; the exit code is 128 + 15."""
    whole = runs.fit(stage, trainer=keys)
    with pytest.raises(Stopped) as stopped:
        runs.fit(stage, SendSignal(batch, signal.SIGTERM), runs.callback(), trainer=keys)
    assert stopped.value.exit_code == 143
    message = str(stopped.value)
    assert f"Training was terminated by SIGTERM at step {step}" in message
    if saved is None:
        assert not runs.last.exists()
        assert "has not written a checkpoint" in message
        assert "resume=true" not in message
        return
    assert f"{runs.last} holds step {saved}." in message
    assert "resume=true" in message
    assert step_of(runs.last) == saved
    resumed = runs.fit(stage, runs.callback("resumed"), resume=runs.last, trainer=keys)
    assert_same_weights(resumed.module, whole.module, **EXACT)


@pytest.mark.parametrize(
    ("hook", "call"), [("on_validation_batch_start", 1), ("on_train_epoch_end", 2), ("on_train_end", 1)]
)
def test_sigterm_outside_of_training_batches_is_reported(runs: CheckpointedRuns, hook: str, call: int) -> None:
    """During validation, after the last epoch, or at the very end: a run that got the signal never counts as finished.

    Lightning checks for the signal only after training batches.
    """
    whole = runs.fit("ppo")
    with pytest.raises(Stopped) as stopped:
        runs.fit("ppo", SendSignal(call, signal.SIGTERM, hook), runs.callback())
    assert stopped.value.exit_code == 143
    assert f"{runs.last} holds step" in str(stopped.value)
    resumed = runs.fit("ppo", runs.callback("resumed"), resume=runs.last)
    assert_same_weights(resumed.module, whole.module, **EXACT)


@pytest.mark.usefixtures("_receive_signals")
@pytest.mark.parametrize(
    ("number", "how", "code"),
    [(signal.SIGINT, "interrupted by Ctrl-C (SIGINT)", 130), (signal.SIGUSR1, "terminated by SIGUSR1", 138)],
)
def test_other_signals_stop_as_sigterm_does(
    runs: CheckpointedRuns, capfd: pytest.CaptureFixture[str], number: signal.Signals, how: str, code: int
) -> None:
    """SIGUSR1 announces the end of a job under SLURM. The exit code is 128 plus the number of the signal."""
    whole = runs.fit("sft")
    with pytest.raises(Stopped) as stopped:
        runs.fit("sft", SendSignal(3, number), runs.callback())
    assert stopped.value.exit_code == code
    assert f"Training was {how} at step 3" in str(stopped.value)
    assert f"{runs.last} holds step 3." in str(stopped.value)
    assert ("Press Ctrl-C again to stop immediately." in capfd.readouterr().err) == (number is signal.SIGINT)
    resumed = runs.fit("sft", runs.callback("resumed"), resume=runs.last)
    assert_same_weights(resumed.module, whole.module, **EXACT)


@pytest.mark.usefixtures("_receive_signals")
def test_a_second_ctrl_c_stops_immediately(runs: CheckpointedRuns) -> None:
    """The step is not finished, so no checkpoint is written. The newest one is reported."""
    interrupts = [SendSignal(7, signal.SIGINT) for _ in range(2)]
    with pytest.raises(Stopped) as stopped:
        runs.fit("ppo", *interrupts, runs.callback(every_n_minutes=0))
    assert stopped.value.exit_code == 130
    assert "interrupted by Ctrl-C (SIGINT) at step 6" in str(stopped.value)
    assert f"{runs.last} holds step 4." in str(stopped.value)
    assert step_of(runs.last) == 4


# On the command line

TINY = [*TINY_MODEL["transformer"], *TINY_DATA]


def interrupt(
    repo: Path, root: Path, number: signal.Signals, is_ready: Callable[[], bool], *overrides: str
) -> tuple[int, str, str]:
    """Start ``python train.py`` and send a signal once ``is_ready``; return exit code, stdout and stderr."""
    command = train_command(root, *TINY, *overrides)
    process = start_python(command[1:], repo, {**os.environ, "COLUMNS": "200"})
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and not is_ready():
            assert time.monotonic() < deadline, "training has not started"
            time.sleep(0.05)
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        kill_group(process.pid)
    return process.returncode, out, err


def has_logged_a_step(log: Path) -> bool:
    return log.is_file() and "train/loss=" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_can_be_resumed(repo: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """It exits with one message, a valid ``last.ckpt`` and no result. ``resume=true`` then completes the run.

    40 rows in batches of 16 make 3 steps per epoch. Ctrl-C writes no checkpoint, so one has to exist before.
    """
    folder = tmp_path / "rlhf" / "sft"
    log, last = folder / "sft.log", folder / "checkpoints" / "last.ckpt"
    keys = ["stage=sft", "data.batch_size=16", "stage.samples=0", "callbacks.checkpoint.every_n_minutes=0"]

    def is_ready() -> bool:
        return has_logged_a_step(log) and last.is_file()

    returned, _, err = interrupt(repo, tmp_path, number, is_ready, *keys, "trainer.max_epochs=100000")
    assert returned == code, err
    assert err.count("Training was ") == 1, err
    assert "Traceback" not in err
    step = step_of(last)
    assert f"{last} holds step {step}." in err
    assert "resume=true" in err
    assert f"{last} holds step {step}." in log.read_text()
    assert not list((tmp_path / "rlhf").rglob("*_final.pt"))
    epochs = -(-step // 3) + 1
    run_train(repo, tmp_path, *TINY, *keys, "resume=true", f"trainer.max_epochs={epochs}")
    assert step_of(last) == 3 * epochs
    assert (folder / "sft_final.pt").is_file()


@pytest.mark.slow
def test_sigterm_stops_the_whole_pipeline(repo: Path, tmp_path: Path) -> None:
    """The current step is stopped, and the next one does not start."""
    run = tmp_path / "rlhf"
    overrides = ["pipeline.steps=[sft,reward]", "trainer.max_epochs=100000"]
    code, out, err = interrupt(
        repo, tmp_path, signal.SIGTERM, lambda: has_logged_a_step(run / "sft" / "sft.log"), *overrides
    )
    assert code == 143, err
    assert err.count("Training was terminated by SIGTERM") == 1, err
    assert "step 2 of 2" not in out
    assert not (run / "reward").exists()
    assert not list(run.rglob("*_final.pt"))
