"""Loading: which rows form a batch, in which order, on which rank, and with which weight in the optimizer step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.data.batches import Batch
from rlhf.distributed import sum_over_ranks

BUCKET_BATCHES = 50  # rows are sorted by length within buckets of at most this many batches


class BucketBatchSampler:
    """Yields row indices in batches of similar length, in an order that depends only on seed and epoch.

    Args:
        lengths: Length of each row, in tokens.
        batch_size: Rows per batch and rank.
        shuffle: Use a new random order in each epoch. Otherwise the longest rows come first, so that a batch that does
            not fit into memory fails at once.
        bucket: Sort rows by length within buckets, to reduce padding.
        seed: Seed of the order.
        drop_last: Leave out the last rows of an epoch if they do not fill a batch.
        rank: Rank of this process.
        world: Number of processes that share the rows. All of them yield the same number of batches, but the last
            batch of a rank is empty if fewer rows than ranks are left.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        shuffle: bool,
        bucket: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = min(batch_size, max(len(lengths) // world, 1))
        self.shuffle = shuffle
        self.bucket = bucket
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world = world
        self.epoch = 0

    @property
    def sampler(self) -> "BucketBatchSampler":
        """The object itself: Lightning calls ``loader.batch_sampler.sampler.set_epoch`` before each epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def size(self) -> int:
        """Rows of a batch of all ranks together."""
        return self.batch_size * self.world

    def __len__(self) -> int:
        return len(self.lengths) // self.size if self.drop_last else -(-len(self.lengths) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.own_rows, self._batches(torch.arange(len(self.lengths)), self.size))

    def rest(self, parts: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return batches of all ranks together of the rows that are left of an epoch.

        With ``drop_last``, other rows fill the only batch if fewer rows are left.

        Args:
            parts: What has been trained on: a number of batches, and the rows of each of them over all ranks. Parts
                are consecutive; each one drew from the rows that the earlier parts had left.
        """
        left, skipped = torch.arange(len(self.lengths)), 0
        for number, (done, size) in enumerate(parts, 1):
            if number == len(parts) and size == self.size:
                skipped = done  # The last part goes on.
            else:
                trained = self._batches(self._filled(left, size), size)[:done]
                left = left[~torch.isin(left, torch.cat([left[:0], *trained]))]
        return self._batches(self._filled(left, self.size), self.size)[skipped:]

    def _filled(self, rows: Tensor, size: int) -> Tensor:
        """Return rows and, if they are too few for a batch, other ones."""
        others = torch.arange(len(self.lengths))
        others = others[~torch.isin(others, rows)]
        return torch.cat([rows, others])[: max(len(rows), size if self.drop_last else 1)]

    def _batches(self, rows: Tensor, size: int) -> list[Tensor]:
        """Return rows as batches of all ranks together, in the order of the epoch."""
        # 1. Put all rows in random order, or in file order.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(rows)
        order = rows[torch.randperm(count, generator=generator)] if self.shuffle else rows
        if self.drop_last:
            order = order[: count - count % size]

        # 2. Sort each bucket by length. Small data get four buckets or more, so that neighbors change every epoch.
        if self.bucket:
            width = size * min(BUCKET_BATCHES, max(count // (4 * size), 1)) if self.shuffle else max(count, 1)
            buckets = order.split(width)
            order = torch.cat([rows[self.lengths[rows].argsort(descending=True, stable=True)] for rows in buckets])

        # 3. Cut the rows into batches, and shuffle the batches.
        batches = [batch for batch in order.split(size) if len(batch)]
        if self.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        return batches

    def own_rows(self, batch: Tensor) -> list[int]:
        """Return the rows of a batch that belong to this rank. There may be none in the last batch."""
        rows: list[int] = batch[self.rank :: self.world].tolist()
        return rows


@dataclass
class EpochPosition:
    """A position within an epoch.

    Attributes:
        batches: Batches of the epoch that count as done.
        parts: The parts of the epoch up to here, see ``BucketBatchSampler.rest``.
    """

    batches: int = 0
    parts: list[tuple[int, int]] = field(default_factory=list)

    def advance(self, size: int) -> None:
        """Count a batch of this many rows over all ranks."""
        done = self.parts.pop()[0] if self.parts and self.parts[-1][1] == size else 0
        self.parts.append((done + 1, size))
        self.batches += 1


class BatchLoader:
    """An iterable of batches that can be resumed within an epoch.

    Args:
        rows: Encoded rows.
        collate: Makes a batch of a list of rows.
        batches: Yields the row indices of each batch.
        per_step: Batches per optimizer step and rank (``trainer.accumulate_grad_batches``).
        row_numbers: Where each row is in the data, from 0, for messages; -1 if that is not known.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        collate: Callable[[list[Any]], Batch],
        batches: BucketBatchSampler,
        per_step: int = 1,
        row_numbers: Sequence[int] | np.ndarray = (),
    ) -> None:
        self.rows = rows
        self.collate = collate
        self.batch_sampler = batches
        self.per_step = per_step
        self.row_numbers = row_numbers
        self._epoch_length = len(batches)  # batches of an epoch; fewer if the Trainer limits them
        self._position = EpochPosition()  # after the last batch that has been yielded
        self._resume_from = EpochPosition()  # at which the next epoch starts

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        start = self.start
        if start is None:
            start = self._resume_from.batches
        self._position, self._resume_from = EpochPosition(start, self._resume_from.parts), EpochPosition()
        rest = map(self.batch_sampler.own_rows, self.batch_sampler.rest(self._position.parts))
        indices = islice(cycle(rest), self._epoch_length - start)
        begun = start % self.per_step  # batches of an optimizer step that has begun before
        for batch in with_loss_weights(map(self._batch, indices), self.per_step, self.batch_sampler.world, begun):
            self._position.advance(self.batch_sampler.size)
            yield batch

    def _batch(self, indices: list[int]) -> Batch:
        if indices:
            batch = self.collate([self.rows[i] for i in indices])
            numbers = [int(self.row_numbers[i]) for i in indices] if len(self.row_numbers) else []
            batch.rows = [None if number < 0 else number for number in numbers]
            batch.indices = indices
            return batch
        # The other ranks have a batch here, and wait for this rank in collective operations.
        shortest = int(self.batch_sampler.lengths.argmin())
        return self.collate([self.rows[shortest]]).as_filler()

    def limit_epoch(self, batches: int, per_step: int) -> None:
        """Set where the Trainer ends an epoch and an optimizer step.

        The loss weights of the last optimizer step then do not count batches that the Trainer never requests, and a
        checkpoint at the end of such an epoch has position 0: the next epoch starts from its first batch.

        Args:
            batches: Batches of an epoch, as ``trainer.limit_train_batches`` limits them.
            per_step: Batches of an optimizer step.
        """
        self._epoch_length, self.per_step = min(batches, len(self)), per_step

    @property
    def start(self) -> int | None:
        """The number of batches of the epoch that count as done after resuming with batches of another size.

        The epoch then continues with the rows that it has left, in new batches. It is rounded up to whole optimizer
        steps, and at least one of them is left. None: the position is that of the checkpoint.
        """
        size, position = self.batch_sampler.size, self._resume_from
        if position.batches == 0 or all(size_of_part == size for _, size_of_part in position.parts):
            return None
        if position.parts[-1][1] == size:
            return position.batches
        done = len(self) - len(self.batch_sampler.rest(position.parts))
        return min(-(-done // self.per_step), (self._epoch_length - 1) // self.per_step) * self.per_step

    def state_dict(self) -> dict[str, Any]:
        position = self._position.batches % max(self._epoch_length, 1)
        return {"position": position, "parts": [*self._position.parts] if position else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parts = state.get("parts", [(state["position"], self.batch_sampler.size)])
        self._resume_from = EpochPosition(state["position"], [(done, size) for done, size in parts])


def with_loss_weights(batches: Iterator[Batch], per_step: int, world: int = 1, begun: int = 0) -> Iterator[Batch]:
    """Set the weights of each batch within its optimizer step, over micro-batches and ranks.

    Lightning averages ``loss * loss_weight`` over ``per_step`` batches and ``world`` ranks. With these weights, the
    result is the mean over all terms of the step, so 4 batches of 8 sequences give the same gradient as 1 batch of 32,
    whatever their lengths (see transformers issue 35203).

    Args:
        batches: The batches of this rank.
        per_step: Batches per optimizer step and rank.
        world: Number of ranks.
        begun: Number of batches of the first optimizer step that were consumed before.
    """
    while step := list(islice(batches, per_step - begun)):
        begun = 0
        if per_step > 1 or world > 1:
            terms = torch.tensor([[batch.loss_terms, batch.sft_terms] for batch in step])
            totals = sum_over_ranks(terms.sum(dim=0)) if world > 1 else terms.sum(dim=0)
            weights = terms.double() * per_step * world / totals.clamp(min=1)
            for batch, (loss_weight, sft_loss_weight) in zip(step, weights.tolist(), strict=True):
                batch.loss_weight, batch.sft_loss_weight = loss_weight, sft_loss_weight
        yield from step
