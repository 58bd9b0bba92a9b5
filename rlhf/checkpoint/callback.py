"""Checkpoints that a killed run can be resumed from exactly."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlhf.checkpoint.boundary import Boundary, position_within_epoch
from rlhf.checkpoint.monitor import MonitorCheck
from rlhf.errors import ConfigError, TrainingError
from rlhf.files import LAST, PART, PREVIOUS, atomic_write, remove, replace_link
from rlhf.schema import NonNegativeFloat, check_arguments

log = logging.getLogger(__name__)
UNSUPPORTED: dict[str, Callable[[Any], bool]] = {  # keywords of ModelCheckpoint, and which values
    "train_time_interval": lambda value: value is not None,
    "save_weights_only": bool,
    "save_last": lambda value: value == "link",
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint to a temporary file in the same directory and then renames it.

    If the process is killed while it writes, the previous checkpoint of that name stays intact. Lightning's own class
    writes to the system's temporary directory, and moving a file from there to another file system is not atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        atomic_write(Path(path), lambda file: torch.save(checkpoint, file))


class RunCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt`` every few minutes, at the end of every epoch and of training, and when training fails.

    The checkpoint before that is kept as ``previous.ckpt``.

    A checkpoint is written only at positions from which a resumed run continues exactly: after the last minibatch of a
    rollout in PPO and GRPO, after an optimizer step in the other stages, and after validation where validation
    follows. It is written at the last such position at which a killed run has lost at most ``every_n_minutes``, if the
    next step and checkpoint take as long as the last ones. Writing one draws no random numbers. A time limit ends
    training at such a position, too.

    Args:
        every_n_minutes: Minutes of work that a killed run may lose. If a step and a checkpoint take more than half of
            this time, it may lose more. 0: ``last.ckpt`` is written at every possible position. null: only at the end
            of epochs and of training. Default: ``5.0``.
        keys: Keywords of Lightning's ``ModelCheckpoint``. ``every_n_train_steps`` counts optimizer steps and writes
            numbered checkpoints, of which ``save_top_k`` are kept. With ``monitor`` set to a metric of validation,
            such as ``val/loss``, they are written after validations only, so that the metric is that of their weights.
            The first validation must log it.

    Raises:
        ConfigError: ``every_n_minutes`` is negative, a keyword contradicts resuming, or ``monitor`` has no effect.
    """

    def __init__(self, every_n_minutes: NonNegativeFloat | None = 5.0, **keys: Any) -> None:
        check_arguments(RunCheckpoint, "callbacks.checkpoint", locals())
        for key, unsupported in UNSUPPORTED.items():
            if unsupported(keys.get(key)):
                raise ConfigError(
                    f"callbacks.checkpoint.{key}={keys[key]} is not supported: last.ckpt, from which a run is resumed, "
                    "is a complete checkpoint and written every callbacks.checkpoint.every_n_minutes.",
                    f"Remove callbacks.checkpoint.{key}.",
                )
        super().__init__(**keys)
        if self.monitor is not None and self.save_top_k == 0:
            raise ConfigError(
                f"callbacks.checkpoint.monitor={self.monitor} has no effect with callbacks.checkpoint.save_top_k=0, "
                "which keeps no numbered checkpoint.",
                "Set callbacks.checkpoint.save_top_k=1.",
            )
        self.every_n_minutes = every_n_minutes
        self._monitor_check = MonitorCheck(self.monitor)
        self.resumable: tuple[Path, int] | None = None  # The newest checkpoint of this run, and its step.
        self._at_boundary = False  # Whether a resumed run would continue exactly from here.
        self._boundary: Boundary | None = None  # The last position that a run can be resumed from exactly.
        self._is_stepping = False  # Whether a later optimizer step has begun, which may have changed the weights.
        self._end: dict[str, Any] = {}  # Entries of the checkpoint if training ends here, within an epoch.
        self._stop_requested = False  # Whether training ends at the next resumable position.
        self._last_written = self._last_boundary = 0.0  # Seconds of the monotonic clock.
        self._write_seconds = self._step_seconds = 0.0  # What the last checkpoint and the last step took.
        self._numbered_step = 0  # The step of the last numbered checkpoint.

    # When to write

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # trainer.plugins may have set another one.
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        debugging = trainer.fast_dev_run  # type: ignore[attr-defined]
        if stage == "fit" and trainer.is_global_zero and self.dirpath and not debugging:
            for leftover in Path(self.dirpath).glob(f"*{self.FILE_EXTENSION}*{PART}"):
                remove(leftover)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_written = self._last_boundary = time.monotonic()
        self._numbered_step = trainer.global_step
        self._end, self._stop_requested = {}, False
        self._monitor_check.start(is_known=bool(self.best_k_models))
        self.resumable = (Path(trainer.ckpt_path), trainer.global_step) if trainer.ckpt_path else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._at_boundary, self._end = False, {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        is_last = getattr(batch, "last", True)  # A minibatch of PPO and GRPO: the last one of its rollout.
        self._at_boundary = is_last and not loop._should_accumulate()
        self._defer_stop(trainer)
        validation_follows = self._validation_follows(trainer)
        if not loop._should_accumulate() and (loop._is_training_done or trainer.should_stop or validation_follows):
            self._end = position_within_epoch(trainer)
        if self._at_boundary and not loop._is_training_done and not validation_follows:
            self._reach_boundary(trainer, pl_module, numbered=self._step_is_due(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._monitor_check.after_validation(trainer)
        if self._is_idle(trainer):
            return
        self._defer_stop(trainer)
        if not self._at_boundary:
            return
        numbered = self._step_is_due(trainer, validated=True) or self._epoch_is_due(trainer, validated=True)
        if not trainer.fit_loop.epoch_loop._is_training_done:
            if not trainer.should_stop:
                self._end = {}
            self._reach_boundary(trainer, pl_module, numbered=numbered)
        elif numbered:
            self._save_numbered(trainer)

    def _defer_stop(self, trainer: Trainer) -> None:
        """Let what ends training between two resumable positions, such as a time limit, end it at the next one."""
        self._stop_requested |= trainer.should_stop
        can_stop = self._at_boundary or trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        trainer.should_stop = self._stop_requested and can_stop

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._is_stepping = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at_boundary = True  # An uninterrupted run does not train on the rest of a rollout, either.
        if self._is_idle(trainer):
            return
        if self._step_is_due(trainer) or self._epoch_is_due(trainer):
            self._save_numbered(trainer)
        if trainer.received_sigterm or not _is_last_epoch(trainer):  # At the end of training, on_train_end writes it.
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_idle(trainer):
            self._monitor_check.after_training(trainer)
            self._save_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        # Writing is a collective operation, and only a single process knows that all ranks have stopped here.
        if trainer.world_size > 1 or self._is_idle(trainer) or self._is_saved(trainer):
            return
        if isinstance(exception, SIGTERMException):
            if trainer.training and self._at_boundary:
                self._save_last(trainer)
        elif self._weights_are_unchanged(trainer, exception) and self._boundary is not None:
            self._save_last(trainer, self._boundary)
            log.warning("Training has failed. %s holds step %d.", self.last_model_path, self._boundary.step)

    def _weights_are_unchanged(self, trainer: Trainer, exception: BaseException) -> bool:
        """Return whether an error was raised before the first step after the last resumable position."""
        if not isinstance(exception, Exception) or self._boundary is None or self._boundary.step != trainer.global_step:
            return False
        # A step that is not finite raises a TrainingError before it changes the weights.
        return not self._is_stepping or isinstance(exception, TrainingError)

    # What to write

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint |= self._end

    def _reach_boundary(self, trainer: Trainer, module: LightningModule, *, numbered: bool) -> None:
        self._step_seconds = time.monotonic() - self._last_boundary
        self._save_if_due(trainer, numbered)
        if trainer.world_size == 1:
            self._boundary, self._is_stepping = Boundary.here(trainer, module), False
        self._last_boundary = time.monotonic()

    def _save_if_due(self, trainer: Trainer, numbered: bool) -> None:
        due = False
        if self.every_n_minutes is not None:
            interval = 60 * self.every_n_minutes
            # A kill during the next write loses this step, the next one, and the time of two writes: the newest
            # checkpoint holds the position at which its own write began. Training gets at least half of the time.
            ahead = min(self._step_seconds + 2 * self._write_seconds, interval / 2)
            due = time.monotonic() - self._last_written + ahead >= interval
        # The clocks of the ranks differ, and not every rank may have seen the signal yet: rank 0 decides for all.
        due = trainer.strategy.broadcast(due or trainer.received_sigterm)
        if numbered:
            self._save_numbered(trainer)
        if (numbered or due) and not self._is_saved(trainer):
            self._save_last(trainer)

    def _save_numbered(self, trainer: Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None or self.monitor in candidates:
            self._save_topk_checkpoint(trainer, candidates)
        self._numbered_step = trainer.global_step

    def _save_last(self, trainer: Trainer, boundary: Boundary | None = None) -> None:
        """Write ``last.ckpt`` of the current position, or of an earlier one after which no weight has changed."""
        if not self.save_last:
            return
        started = time.monotonic()
        newest = self.resumable[0] if self.resumable else None
        if trainer.is_global_zero and newest is not None and newest.name == LAST and newest.is_file():
            replace_link(newest.with_name(PREVIOUS), newest)
        if boundary is None:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        else:
            self._save_boundary(trainer, boundary)
        self._last_written = time.monotonic()
        self._write_seconds = self._last_written - started
        self.resumable = Path(self.last_model_path), trainer.global_step

    def _save_boundary(self, trainer: Trainer, boundary: Boundary) -> None:
        assert self.dirpath is not None
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint |= boundary.entries
        checkpoint["state_dict"] |= boundary.module_state
        self.last_model_path = str(Path(self.dirpath, LAST))
        trainer.strategy.save_checkpoint(checkpoint, self.last_model_path)

    def _step_is_due(self, trainer: Trainer, *, validated: bool = False) -> bool:
        """Return whether ``every_n_train_steps`` asks for a numbered checkpoint here.

        Args:
            trainer: The Trainer.
            validated: Whether the current weights have just been validated.
        """
        steps = self._every_n_train_steps
        is_due = steps >= 1 and trainer.global_step // steps > self._numbered_step // steps
        return is_due and (validated or not self._monitors_validation)

    def _epoch_is_due(self, trainer: Trainer, *, validated: bool = False) -> bool:
        """Return whether ``every_n_epochs`` asks for one, here or at each validation of this epoch."""
        epochs = self._every_n_epochs
        is_due = epochs >= 1 and (trainer.current_epoch + 1) % epochs == 0
        return is_due and validated == self._monitors_validation

    @property
    def _monitors_validation(self) -> bool:
        return self.monitor is not None and self.monitor.startswith("val/")

    def _is_saved(self, trainer: Trainer) -> bool:
        return self.resumable is not None and self.resumable[1] == trainer.global_step

    @staticmethod
    def _is_idle(trainer: Trainer) -> bool:
        debugging = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        return debugging or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking

    @staticmethod
    def _validation_follows(trainer: Trainer) -> bool:
        loop = trainer.fit_loop
        return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _is_last_epoch(trainer: Trainer) -> bool:
    """Return whether the epoch that has just ended is the last one.

    ``fit_loop.done`` is not used because reading it changes the count of epochs.
    """
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if steps != -1 and trainer.global_step >= steps:
        return True
    progress: Any = trainer.fit_loop.epoch_progress.current
    return epochs is not None and epochs != -1 and progress.processed >= epochs
