"""Which rows make a batch, in which order, on which rank."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from rlhf.data.batches import Batch

WINDOW = 50  # batches among which rows of like length are put together


class LengthBuckets:
    """Row indices in batches of like length, in an order drawn from seed and epoch.

    Args:
        lengths: of the rows, tokens.
        batch_size: rows a rank gets in a batch.
        shuffle: draw a new order each epoch; otherwise longest first, so that a batch too large shows at once.
        bucket: put rows of like length together, so that little is padding.
        seed: of the order.
        whole_only: leave out the last rows of an epoch where they do not fill a batch.
        rank, world: this process among those that share the rows; each gets the same number of batches.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool,
        bucket: bool = True,
        seed: int = 0,
        whole_only: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size = min(batch_size, max(len(lengths) // world, 1))
        self.shuffle = shuffle
        self.bucket = bucket
        self.seed = seed
        self.whole_only = whole_only
        self.rank = rank
        self.world = world
        self.epoch = 0

    @property
    def sampler(self) -> "LengthBuckets":
        """Whose ``set_epoch`` Lightning calls before each epoch: it looks for ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole = self.batch_size * self.world
        return len(self.lengths) // whole if self.whole_only else -(-len(self.lengths) // whole)

    def __iter__(self) -> Iterator[list[int]]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count, whole = len(self.lengths), self.batch_size * self.world
        order = torch.randperm(count, generator=draw) if self.shuffle else torch.arange(count)
        if self.bucket:
            window = whole * min(WINDOW, max(count // (4 * whole), 1)) if self.shuffle else count
            order = torch.cat(
                [part[self.lengths[part].argsort(descending=True, stable=True)] for part in order.split(window)]
            )
        batches = [batch for batch in order.split(whole) if len(batch) == whole or not self.whole_only]
        if self.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=draw)]
        for batch in batches:
            rows = batch[self.rank :: self.world].tolist()
            # a rank that the last rows do not reach answers with a copy: every rank takes every step
            yield rows or batch[:1].tolist()


class BatchLoader:
    """An iterable of batches that Lightning can resume.

    Args:
        rows: encoded rows.
        collate: makes a batch of some of them.
        batches: which ones, in an order of each epoch's own.
        per_step: batches in an optimizer step (``trainer.accumulate_grad_batches``).
    """

    def __init__(
        self, rows: Sequence[Any], collate: Callable[[list[Any]], Batch], batches: LengthBuckets, per_step: int = 1
    ) -> None:
        self.rows = rows
        self.collate = collate
        self.batch_sampler = batches
        self.per_step = per_step
        self._taken = 0  # batches of this epoch handed out so far
        self._skip = 0  # batches to leave out once, after a resume

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        self._taken, self._skip = self._skip, 0
        indices = islice(iter(self.batch_sampler), self._taken, None)
        for batch in with_loss_weights(map(self._batch, indices), self.per_step, self.batch_sampler.world):
            self._taken += 1
            yield batch

    def _batch(self, indices: list[int]) -> Batch:
        return self.collate([self.rows[i] for i in indices])

    def state_dict(self) -> dict[str, int]:
        return {"taken": self._taken % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["taken"]


def with_loss_weights(batches: Iterator[Batch], per_step: int, world: int = 1) -> Iterator[Batch]:
    """Give each batch its shares of the optimizer step it belongs to, over micro-batches and ranks.

    With it, the mean of ``loss x share`` that Lightning takes over ``per_step`` batches and ``world`` ranks is the mean
    over all terms of the loss: 4 batches of 8 are 1 batch of 32, however long their texts (transformers#35203).
    """
    while step := list(islice(batches, per_step)):
        if per_step > 1 or world > 1:
            terms = torch.tensor([[batch.loss_terms, batch.sft_terms] for batch in step])
            totals = terms.sum(dim=0)
            if world > 1:
                totals = totals.cuda() if dist.get_backend() == "nccl" else totals
                dist.all_reduce(totals)
            shares = terms.double() * per_step * world / totals.cpu().clamp(min=1)
            for batch, (loss_weight, sft_loss_weight) in zip(step, shares.tolist(), strict=True):
                batch.loss_weight, batch.sft_loss_weight = loss_weight, sft_loss_weight
        yield from step
