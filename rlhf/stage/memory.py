"""Out of memory: training batches that are computed in chunks."""

import gc
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.stage.precision import gradient_scaler

log = logging.getLogger(__name__)
MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device or of the host has run out."""
    is_raised_by_torch = isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_raised_by_torch


class BatchSplitter:
    """Computes training batches in chunks, of which there are twice as many whenever memory runs out.

    The weighted losses of the chunks add up to the loss of the batch, so the optimizer step is the same up to rounding.
    ``backward`` runs the forward passes as well, so that it can start an optimizer step again: a backward pass that has
    run out of memory leaves a part of its gradient behind.

    Attributes:
        chunks: Number of chunks of a batch.
    """

    def __init__(self) -> None:
        self.chunks = 1
        self._is_waiting = False

    def postpone(self, module: Any) -> Tensor:
        """Return a placeholder for the loss of the batch that has started last, which ``backward`` computes."""
        self._is_waiting = True
        return torch.zeros((), device=module.device, requires_grad=True)

    def backward(self, module: Any) -> bool:
        """Add the gradient of the batch that ``postpone`` has left to it; return False if there is none."""
        if not self._is_waiting:
            return False
        self._is_waiting = False
        step = [micro.batch for micro in module.nonfinite.step]
        todo = step[-1:]
        while (metrics := self._compute(module, todo)) is None:
            # The exception has been released by now, and with it the activations that its traceback kept alive.
            gc.collect()
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            self.chunks *= 2
            module.zero_grad()
            todo = step
            log.warning(
                "Out of memory in a training step. From now on, batches are computed in %d chunks, with the same "
                "result.",
                self.chunks,
            )
        for chunk, values in metrics:
            module.add_metrics(chunk, values)
        return True

    def _compute(self, module: Any, batches: Sequence[Any]) -> list[tuple[Any, Any]] | None:
        """Run forward and backward passes. Return the metrics of the last batch; None if memory has run out."""
        metrics: list[tuple[Any, Any]] = []
        plugin = module.trainer.precision_plugin
        scaler = gradient_scaler(plugin)
        try:
            for batch in batches:
                metrics = []
                for chunk in self._split(batch):
                    with plugin.train_step_context():
                        loss, values = module.training_loss(chunk)
                    loss = module.nonfinite.watch(loss) / module.trainer.accumulate_grad_batches
                    (loss if scaler is None else scaler.scale(loss)).backward()
                    metrics.append((chunk, values))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.chunks >= max(batch.row_count for batch in batches):
                raise
            return None
        return metrics

    def _split(self, batch: Any) -> Iterator[Any]:
        if self.chunks == 1 or batch.is_filler:
            yield batch
            return
        size = -(-batch.row_count // self.chunks)
        for start in range(0, batch.row_count, size):
            yield batch.select(range(start, min(start + size, batch.row_count)))
