"""Base class of stages that log: training metrics, validation metrics, samples and throughput."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from rlhf.data import Batch
from rlhf.models import full_tensor
from rlhf.stage.loggers import log_table
from rlhf.stage.step_metrics import Metrics, StepMetrics
from rlhf.stage.throughput import ThroughputMeter


class ReportingModule(lightning.LightningModule):
    """Logs metrics that are reduced over micro-batches and ranks.

    Attributes:
        metrics: The training metrics logged most recently, reduced over all ranks. Callbacks may read them and must not
            change them.
        metrics_step: The optimizer step that ``metrics`` belong to. -1 until the first step is complete.
        validated_step: The optimizer step of the last validation. -1 until the first validation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}
        self.metrics_step = self.validated_step = -1
        self._meter = ThroughputMeter()
        self._step_metrics = StepMetrics()

    def on_train_start(self) -> None:
        self._meter = ThroughputMeter()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, Batch) and not batch.is_filler:
            self._meter.add(batch.token_count, batch.sequence_count)

    def on_validation_start(self) -> None:
        self._meter.pause()

    def on_validation_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics.items()
        means = {name.removeprefix("val/"): float(mean) for name, mean in metrics if name.startswith("val/")}
        derived = self.derived_metrics(means)
        self.log_dict({f"val/{name}": value for name, value in derived.items()}, sync_dist=True)

    def on_validation_end(self) -> None:
        self._meter.resume()
        if not self.trainer.sanity_checking:
            self.validated_step = self.global_step

    def finish_step(self, metrics: Mapping[str, Tensor | float], *, skipped: bool) -> None:
        """Log the metrics of an optimizer step, if ``trainer.log_every_n_steps`` asks, before the weights change.

        Args:
            metrics: Metrics of the optimizer.
            skipped: The step is skipped because it is not finite.
        """
        if not self.is_log_step:
            return
        self.log_train({**metrics, **self.throughput()})
        reduced = self._step_metrics.reduce()
        self.metrics, self.metrics_step = {**reduced, **self.derived_metrics(reduced)}, self.global_step
        self.send_metrics()

    def send_metrics(self) -> None:
        """Send ``metrics`` to all loggers, and show them in ``trainer.callback_metrics`` and ``logged_metrics``.

        ``self.log`` does this as well. It takes half a millisecond for each metric, which slows small models down.
        """
        for logger in self.loggers:
            logger.log_metrics({**self.metrics, "epoch": self.current_epoch}, step=self.metrics_step)
            logger.save()
        shown = {name: torch.tensor(value) for name, value in self.metrics.items()}
        self.trainer.callback_metrics.update(shown)
        self.trainer.logged_metrics.update(shown)

    @property
    def is_log_step(self) -> bool:
        """Whether the metrics of the current optimizer step are logged; equal on all ranks."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every > 0 and (self.trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0)

    def log_train(self, metrics: Metrics, weight: float = 1.0) -> None:
        """Add metrics of a micro-batch to those that the optimizer step logs, if ``trainer.log_every_n_steps`` asks.

        What is logged is the weighted mean over the micro-batches of the step and over all ranks.

        Args:
            metrics: Values by full name.
            weight: Number of terms that the values are means over, or a number in proportion to it. A ``Mean`` has its
                own weight.
        """
        if self.is_log_step:
            self._step_metrics.add(metrics, weight)

    def derived_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return metrics that are functions of other ones, such as a difference of two means.

        Args:
            metrics: Training metrics of an optimizer step, or validation metrics of an epoch without ``val/``.
        """
        return {}

    def log_val(self, metrics: Mapping[str, Tensor | float], weight: int) -> None:
        """Log metrics of a validation batch under ``val/``.

        Args:
            metrics: Names and values. The value of an epoch is the weighted mean over its batches.
            weight: Number of terms that the values are means over.
        """
        names = {f"val/{name}": value for name, value in metrics.items()}
        # The total weight of a rank must not be an integer: Lightning truncates the mean of integers over the ranks.
        self.log_dict(names, on_step=False, on_epoch=True, batch_size=float(weight), sync_dist=True)  # type: ignore[arg-type]

    def log_samples(self, header: Sequence[str], rows: Sequence[Sequence[str | float]], name: str = "samples") -> None:
        """Show samples as a table in every logger that can, see ``log_table``. Only rank 0 writes.

        Args:
            header: Names of the columns, such as prompt, response and score.
            rows: One row per sample: text, or numbers.
            name: Name of the table.
        """
        if self.trainer.is_global_zero:
            loggers: Any = self.loggers
            log_table(loggers, header, rows, name=name, step=self.global_step)

    def optimizer_metrics(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor | float]:
        """Return the norm of the total gradient before clipping, and the learning rate."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return {"grad_norm": full_tensor(nn.utils.get_total_norm(gradients)), "lr": optimizer.param_groups[0]["lr"]}

    def throughput(self) -> dict[str, float]:
        """Return tokens and sequences per second since the previous call, without the time of validation.

        The mean of the results of all ranks is their total throughput.
        """
        return self._meter.rates(self.trainer.world_size)
