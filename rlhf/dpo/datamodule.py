"""Preference pairs with the reference's log-probs, once these are known."""

from collections.abc import Callable
from typing import Any

from rich.progress import track
from torch import Tensor

from rlhf.data import PairBatch, PreferenceDataModule


class DPODataModule(PreferenceDataModule):
    """Pairs of answers. See RecordDataModule for the keys."""

    def store_reference(self, score: Callable[[PairBatch], Tensor]) -> None:
        """Have every pair scored by the reference, once.

        Args:
            score: batch of pairs to [2 x pairs] summed log-probs, nats, chosen answers first.
        """
        for split in ("train", "val"):
            rows = sorted(self.encoded(split) if self.records(split) else [], key=self.length, reverse=True)
            parts = [rows[i : i + self.eval_batch_size] for i in range(0, len(rows), self.eval_batch_size)]
            for part in track(parts, f"reference log-probs, {split}", transient=True, disable=not parts):
                batch: Any = self.collate(part)
                chosen, rejected = batch.halves(score(batch))
                for row, one, other in zip(part, chosen.tolist(), rejected.tolist(), strict=True):
                    row.reference = (one, other)
