"""Our side: a callback for ``train.py`` that records the steps of a real run."""

from typing import Any

import lightning
from timing import Steps, tokens_of


class RecordSteps(lightning.Callback):
    """Records the end of every training batch. In PPO and GRPO, a step is an iteration.

    Args:
        path: See ``Steps``.
    """

    def __init__(self, path: str) -> None:
        self.steps = Steps(path)
        self.sequences = self.tokens = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sequences += batch.row_count if not hasattr(batch, "new_sequences") else batch.new_sequences
        self.tokens += tokens_of(batch)
        if getattr(batch, "last", True):
            self.steps.end(self.sequences, self.tokens, [row for row in batch.rows if row is not None])
            self.sequences = self.tokens = 0
