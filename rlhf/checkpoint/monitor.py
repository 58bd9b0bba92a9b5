"""The metric by which the best checkpoints are kept: whether it exists."""

import logging
from difflib import get_close_matches

from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from rlhf.errors import ConfigError

log = logging.getLogger(__name__)


class MonitorCheck:
    """Checks ``callbacks.checkpoint.monitor`` at the first validation of a run and at the end of training.

    Later validations may lack the metric. They write no numbered checkpoint.

    Args:
        monitor: The name of the metric. None: there is nothing to check.
    """

    def __init__(self, monitor: str | None) -> None:
        self.monitor = monitor
        self._is_checked = False

    def start(self, *, is_known: bool) -> None:
        """Start a run.

        Args:
            is_known: Whether the checkpoint that training resumes from has values of the metric.
        """
        self._is_checked = is_known

    def after_validation(self, trainer: Trainer) -> None:
        """Check that the first validation of a run has logged the metric.

        A metric of training may be logged later.

        Raises:
            ConfigError: It has not.
        """
        if self.monitor is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        is_first, self._is_checked = not self._is_checked, True
        if not is_first or not self.monitor.startswith("val") or self.monitor in trainer.callback_metrics:
            return
        available = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        similar = get_close_matches(self.monitor, available, n=1, cutoff=0.0)
        raise ConfigError(
            f"callbacks.checkpoint.monitor must be a metric of validation ({', '.join(available)}), got "
            f"{self.monitor}.",
            f"Set callbacks.checkpoint.monitor={similar[0]}." if similar else "Set callbacks.checkpoint.monitor=null.",
        )

    def after_training(self, trainer: Trainer) -> None:
        """Warn if training ends and the metric has not been logged at any time."""
        if self.monitor is None or self._is_checked or self.monitor in trainer.callback_metrics:
            return
        log.warning(
            "callbacks.checkpoint.monitor=%s has no effect: %s, so no checkpoint has been kept by it.",
            self.monitor,
            "there was no validation" if self.monitor.startswith("val") else "training has logged no such metric",
        )
