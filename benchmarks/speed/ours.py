"""Our side: a callback for ``train.py`` that records the steps of a real run."""

import time
from typing import Any

import lightning
from flops import useful_flops
from timing import Steps, tokens_of


class RecordSteps(lightning.Callback):
    """Records the end of every training batch. In PPO and GRPO, a step is an iteration.

    Args:
        path: See ``Steps``.
    """

    def __init__(self, path: str) -> None:
        self.steps = Steps(path)
        self.sequences = self.tokens = 0
        self.flops = 0.0
        self.update_started: float | None = None  # of an iteration of PPO, at the end of its first minibatch

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.steps.watch(module.policy.lm.base_model if hasattr(module, "policy") else module.model.trunk)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sequences += batch.row_count if not hasattr(batch, "new_sequences") else batch.new_sequences
        self.tokens += tokens_of(batch)
        if getattr(batch, "first", False):
            self.update_started = time.perf_counter()
        elif self.counts_flops(module):
            self.flops += useful_flops(module, batch)
        if getattr(batch, "last", True):
            seconds = time.perf_counter() - self.update_started if self.update_started is not None else None
            rows = [row for row in batch.rows if row is not None]
            self.steps.end(self.sequences, self.tokens, rows, self.flops, seconds)
            self.sequences, self.tokens, self.flops = 0, 0, 0.0

    @staticmethod
    def counts_flops(module: Any) -> bool:
        """Return whether ``useful_flops`` knows the architecture."""
        lm = module.policy.lm if hasattr(module, "policy") else module.model.trunk
        return bool(lm.config.model_type == "llama")
