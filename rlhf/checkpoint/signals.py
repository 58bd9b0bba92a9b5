"""An orderly end of a run after SIGTERM, SIGUSR1 and Ctrl-C: finish the step, save, and say how to continue."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlhf.checkpoint.callback import RunCheckpoint
from rlhf.errors import Stopped
from rlhf.logs import metrics_log

CTRL_C = "Ctrl-C: the run stops after the current step. Press Ctrl-C again to stop immediately.\n"
CAUSES = {
    "SIGTERM": "terminated by SIGTERM",
    "SIGUSR1": "terminated by SIGUSR1",
    "SIGINT": "interrupted by Ctrl-C (SIGINT)",
}


@contextmanager
def report_signals(trainer: Trainer) -> Iterator[None]:
    """Raise ``Stopped`` if SIGTERM, SIGUSR1 or Ctrl-C ends a call of the Trainer in this context.

    After the first signal, training stops at the end of the current batch, and ``RunCheckpoint`` writes a checkpoint if
    a resumed run can continue exactly from there. A second Ctrl-C stops immediately.

    Lightning handles SIGTERM and Ctrl-C as well: after SIGTERM the process would end with exit code 0 and without a
    message, a signal that arrives after the last batch would be ignored, and Ctrl-C would interrupt a step.
    """
    receiver = SignalReceiver(trainer)
    try:
        with receiver.installed():
            yield
    except RuntimeError as error:
        if receiver.first is not None and trainer.world_size > 1:  # Another rank has stopped before this one.
            raise _stopped(trainer, receiver.first) from error
        raise
    except SystemExit as error:
        if isinstance(error, SIGTERMException):
            raise _stopped(trainer, receiver.first or signal.SIGTERM) from error
        if isinstance(error.__context__, KeyboardInterrupt):
            raise _stopped(trainer, signal.SIGINT) from error
        raise
    if receiver.first is not None:
        raise _stopped(trainer, receiver.first)


class SignalReceiver:
    """Remembers the first signal and lets Lightning stop as after SIGTERM.

    Args:
        trainer: The Trainer to stop.

    Attributes:
        first: The first signal that has arrived; None so far.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.first: signal.Signals | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Receive the signals during this context. A signal that the process ignores stays ignored."""
        connector = self.trainer._signal_connector
        connector._sigterm_notifier_fn = self.receive  # type: ignore[method-assign, assignment]
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGUSR1") if hasattr(signal, name)]
        previous = {number: signal.getsignal(number) for number in numbers}
        defaults = (signal.SIG_DFL, signal.default_int_handler)
        replaced = [number for number, handler in previous.items() if handler in defaults]
        for number in replaced:
            signal.signal(number, self.receive)
        try:
            yield
        finally:
            for number in replaced:
                signal.signal(number, previous[number])

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal and pass it on to the ranks that Lightning has started.

        Lightning's own handler communicates with the other ranks. They wait forever if the signal arrives while they
        are in another collective operation.
        """
        received = signal.Signals(number)
        # Before it installs its handlers, the Trainer does not check for signals.
        started = bool(self.trainer._signal_connector._original_handlers)
        if received is signal.SIGINT and (self.first is signal.SIGINT or not started):
            signal.default_int_handler(number, frame)
        launcher: Any = self.trainer.strategy.launcher
        # A terminal sends Ctrl-C to all ranks itself.
        if self.first is None and isinstance(launcher, _SubprocessScriptLauncher) and received is not signal.SIGINT:
            launcher.kill(received)
        if self.first is None and received is signal.SIGINT and self.trainer.is_global_zero:
            sys.stderr.write(CTRL_C)
        self.first = self.first or received
        self.trainer._signal_connector.received_sigterm = True


def _stopped(trainer: Trainer, by: signal.Signals) -> Stopped:
    """Return the report of what was stopped and how to continue. On ranks other than 0, it is empty."""
    if not trainer.is_global_zero:
        return Stopped("", exit_code=128 + by)
    how = CAUSES[by.name]
    if trainer.state.fn == TrainerFn.TESTING:
        stopped = Stopped(f"The evaluation was {how}.", "Repeat the command to evaluate again.", exit_code=128 + by)
    else:
        callbacks = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint))
        checkpoint = next(callbacks, None)
        resumable = checkpoint.resumable if checkpoint else None
        what = f"Training was {how} at step {trainer.global_step}, and no final model was written."
        if resumable is None:
            message, hint = f"{what} This run has not written a checkpoint.", "Repeat the command to start over."
        else:
            message = f"{what} The checkpoint {resumable[0]} holds step {resumable[1]}."
            hint = "Repeat the command with resume=true to continue from it."
        stopped = Stopped(message, hint, exit_code=128 + by)
    metrics_log.error("%s", stopped)
    return stopped
