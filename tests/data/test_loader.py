"""Batch order, sharing among ranks, resuming within an epoch, and loss weights."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

import pytest
import torch

from forked import kill_group, start_python
from rlhf.data import BatchLoader, EncodedResponse, PairBatch, SequenceBatch
from rlhf.data.loader import BucketBatchSampler, with_loss_weights
from rlhf.sft.objective import cross_entropy_loss

LENGTHS = [3, 50, 4, 49, 5, 48, 6, 47, 7, 46, 8]  # 11 rows


def epoch(batches: BucketBatchSampler, number: int = 0) -> list[list[int]]:
    batches.set_epoch(number)
    return list(batches)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 11, 100])
def test_every_epoch_contains_every_row_once(shuffle: bool, bucket: bool, batch_size: int) -> None:
    """11 rows give ceil(11 / size) batches, as ``len`` says, of at most ``size`` rows."""
    batches = BucketBatchSampler(LENGTHS, batch_size, shuffle=shuffle, bucket=bucket)
    for number in range(3):
        rows = epoch(batches, number)
        assert sorted(chain(*rows)) == list(range(11))
        assert len(rows) == len(batches) == -(-11 // min(batch_size, 11))
        assert max(map(len, rows)) <= batch_size


def test_the_order_depends_on_epoch_and_seed_only() -> None:
    """A run that resumes in epoch 3 uses the order of epoch 3. The global random state is neither used nor changed."""
    lengths = list(range(100))
    first, again = (
        BucketBatchSampler(lengths, 3, shuffle=True, seed=1),
        BucketBatchSampler(lengths, 3, shuffle=True, seed=1),
    )
    orders = [epoch(first, number) for number in range(4)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert epoch(again, 3) == orders[3]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({str(order) for order in orders}) == 4
    assert epoch(BucketBatchSampler(lengths, 3, shuffle=True, seed=2)) != orders[0]


def test_without_shuffling_the_longest_rows_come_first() -> None:
    """A batch that does not fit into memory fails at once: 50 49 48 47, 46 8 7 6, 5 4 3."""
    rows = epoch(BucketBatchSampler(LENGTHS, 4, shuffle=False))
    assert [[LENGTHS[i] for i in batch] for batch in rows] == [[50, 49, 48, 47], [46, 8, 7, 6], [5, 4, 3]]


def test_buckets_reduce_padding() -> None:
    """400 rows of 1 to 400 tokens in batches of 4 have less than a fifth of the padding."""

    def padding(bucket: bool) -> int:
        batches = BucketBatchSampler(list(range(1, 401)), 4, shuffle=True, bucket=bucket)
        return sum(len(rows) * (max(rows) + 1) - sum(row + 1 for row in rows) for rows in batches)

    assert padding(bucket=True) < padding(bucket=False) / 5


def test_small_data_are_combined_differently_in_each_epoch() -> None:
    """40 rows in batches of 2 would fit into one bucket. Then the same rows would share a batch in every epoch."""
    batches = BucketBatchSampler(list(range(40)), 2, shuffle=True)
    pairs = [{frozenset(rows) for rows in epoch(batches, number)} for number in range(2)]
    assert pairs[0] != pairs[1]


def test_drop_last_leaves_out_short_and_long_rows_equally_often() -> None:
    """Of 11 rows, 3 are left out of each of 400 epochs: each row of 109 on average."""
    batches = BucketBatchSampler(LENGTHS, 4, shuffle=True, drop_last=True)
    used = Counter(row for number in range(400) for batch in epoch(batches, number) for row in batch)
    assert all(80 <= 400 - used[row] <= 140 for row in range(11))


def test_drop_last_leaves_out_rows_that_do_not_fill_a_batch() -> None:
    """11 rows in batches of 4: two full batches, and 3 rows that are left out, different ones in each epoch."""
    batches = BucketBatchSampler(LENGTHS, 4, shuffle=True, bucket=False, drop_last=True)
    left_out = set()
    for number in range(6):
        rows = epoch(batches, number)
        assert [len(batch) for batch in rows] == [4, 4]
        assert len(batches) == 2
        left_out.add(frozenset(range(11)) - set(chain(*rows)))
    assert len(left_out) > 1


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("count", [3, 8, 11, 13])
def test_ranks_share_the_rows_and_have_equal_numbers_of_batches(world: int, count: int) -> None:
    """Together, the ranks get every row once. Only the last batch of a rank may be empty."""
    ranks = [BucketBatchSampler(list(range(count)), 2, shuffle=True, rank=rank, world=world) for rank in range(world)]
    orders = [epoch(rank, 1) for rank in ranks]
    assert {len(order) for order in orders} == {len(ranks[0])}
    assert sorted(chain(*chain(*orders))) == list(range(count))


@pytest.mark.parametrize("count", [3, 9])
def test_a_rank_without_rows_gets_a_batch_without_terms(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """9 rows on 4 ranks with batches of 2: one row is left for the second step, and 3 ranks repeat a row meanwhile.

    The repeated rows have weight 0, and the weights of all ranks add up to their number, so that the mean of the
    weighted losses over ranks is the mean over the rows.
    """
    orders = []
    for rank in range(4):
        totals = iter([count] if count == 3 else [8, 1])
        monkeypatch.setattr("rlhf.data.loader.sum_over_ranks", lambda own, totals=totals: own.new_tensor(next(totals)))
        batches = BucketBatchSampler([5] * count, 2, shuffle=False, rank=rank, world=4)
        orders.append(list(BatchLoader([row(0)] * count, SequenceBatch.collate, batches)))
    *_, last = zip(*orders, strict=True)
    left = count % 8
    assert [batch.is_filler for batch in last] == [rank >= left for rank in range(4)]
    assert [batch.loss_terms for batch in last] == [1] * left + [0] * (4 - left)
    assert [batch.loss_weight for batch in last] == pytest.approx([4 / left] * left + [0.0] * (4 - left))
    assert all(len(batch.input_ids) for batch in last), "the ranks must run the same number of forward passes"


def test_a_filler_batch_has_no_terms() -> None:
    """Neither has its inner batch, by which metrics are weighted."""
    sequences = SequenceBatch.collate([row(2), row(3)])
    filler = PairBatch(sequences, torch.zeros(1)).as_filler().to("cpu")
    assert (filler.loss_terms, filler.sft_terms, filler.sequences.loss_terms) == (0, 0, 0)
    assert (filler.loss_weight, filler.sft_loss_weight) == (0.0, 0.0)


@pytest.mark.parametrize("limit", [5, 6])
def test_an_epoch_that_ends_within_an_optimizer_step_has_its_own_weights(limit: int) -> None:
    """11 batches of one row, 4 per step, and an epoch of 5 or 6 batches, as with ``trainer.limit_train_batches``.

    The weights of every step add up to 4, by which Lightning divides. Batches that are never requested do not count.
    """
    batches = BucketBatchSampler(LENGTHS, 1, shuffle=True, seed=3)
    limited = BatchLoader([row(i) for i in range(11)], SequenceBatch.collate, batches, per_step=4)
    limited.limit_epoch(limit, 4)
    weights = [batch.loss_weight for batch in limited]
    assert len(weights) == limit
    assert [sum(weights[:4]), sum(weights[4:])] == pytest.approx([4.0, 4.0])


def row(index: int) -> EncodedResponse:
    """Row i: all tokens are 10 + i, and the response has i + 1 tokens."""
    return EncodedResponse([10 + index] * (index + 2), 1)


def loader(per_step: int = 1) -> BatchLoader:
    return BatchLoader(
        [row(i) for i in range(11)],
        SequenceBatch.collate,
        BucketBatchSampler(LENGTHS, 2, shuffle=True, seed=7),
        per_step,
    )


def rows_of(batches: list[SequenceBatch]) -> list[list[int]]:
    return [(batch.input_ids[:, 0] - 10).tolist() for batch in batches]


@pytest.mark.parametrize("position", [0, 1, 2, 4, 6])
def test_a_loader_resumes_within_an_epoch(position: int) -> None:
    """After ``position`` of 6 batches of epoch 2, a new loader yields the rest of epoch 2 and then all of epoch 3."""
    first = loader(per_step=2)
    first.batch_sampler.set_epoch(2)
    complete = rows_of(list(first))
    first.batch_sampler.set_epoch(3)
    following = rows_of(list(first))

    first.batch_sampler.set_epoch(2)
    stopped = iter(first)
    for _ in range(position):
        next(stopped)
    second = loader(per_step=2)
    second.load_state_dict(first.state_dict() if position else {"position": 0})
    second.batch_sampler.set_epoch(2)
    if position < 6:  # after the last batch, the next epoch starts at its first batch
        assert rows_of(list(second)) == complete[position:]
    second.batch_sampler.set_epoch(3)
    assert rows_of(list(second)) == following


def test_an_optimizer_step_that_has_begun_has_fewer_batches() -> None:
    """Of 11 batches, 3 are done. With two batches per step, Lightning steps after batches 4, 6, 8, 10 and 11."""
    batches = BucketBatchSampler(LENGTHS, 1, shuffle=True, seed=7)
    resumed = BatchLoader([row(i) for i in range(11)], SequenceBatch.collate, batches, per_step=2)
    resumed.load_state_dict({"position": 3})
    weights = [batch.loss_weight for batch in resumed]
    assert weights[0] == weights[-1] == 2.0
    assert [sum(weights[k : k + 2]) for k in (1, 3, 5)] == pytest.approx([2.0] * 3)


def test_a_resumed_loader_computes_the_same_weights() -> None:
    """Batches 2 and 3 form an optimizer step, whether or not this process has loaded batches 0 and 1."""
    complete = [batch.loss_weight for batch in loader(per_step=2)]
    resumed = loader(per_step=2)
    resumed.load_state_dict({"position": 2})
    assert [batch.loss_weight for batch in resumed] == complete[2:]
    assert len(set(complete)) > 1


@pytest.mark.parametrize(
    ("size", "per_step", "start"), [(3, 1, 2), (3, 2, 2), (1, 1, 6), (1, 4, 8), (8, 1, 1), (8, 2, 0)]
)
def test_an_epoch_continues_with_batches_of_another_size(size: int, per_step: int, start: int) -> None:
    """3 batches of 2 rows are done, and 5 of 11 rows are left. They come first, in at least one step."""
    first = loader()
    stopped = iter(first)
    done = [row for _ in range(3) for row in rows_of([next(stopped)])[0]]
    batches = BucketBatchSampler(LENGTHS, size, shuffle=True, seed=7)
    second = BatchLoader(first.rows, SequenceBatch.collate, batches, per_step)
    second.load_state_dict(first.state_dict())
    assert second.start == start
    following = [row for batch in rows_of(list(second)) for row in batch]
    left = set(range(11)) - set(done)
    assert set(following) <= left
    assert (set(following) == left) == (size * (len(second) - start) >= len(left))
    assert second.start is None
    assert sorted(row for batch in rows_of(list(second)) for row in batch) == list(range(11)), "the next epoch is whole"


def test_a_limited_epoch_continues_with_batches_of_another_size() -> None:
    """Of 6 batches of 2 rows, the Trainer takes 4, of which 2 are done. With batches of 1, 4 of 8 are."""
    first = loader()
    first.limit_epoch(4, 1)
    list(islice(first, 2))
    second = BatchLoader(first.rows, SequenceBatch.collate, BucketBatchSampler(LENGTHS, 1, shuffle=True, seed=7))
    second.load_state_dict(first.state_dict())
    second.limit_epoch(8, 1)
    assert second.start == 4
    assert len(list(second)) == 4


@pytest.mark.parametrize("sizes", [(2, 1, 1, 2), (2, 1, 2, 1), (1, 3, 3, 1), (1, 2, 1, 1), (2, 2, 1, 1)])
def test_an_epoch_can_be_resumed_with_other_sizes_again_and_again(sizes: Sequence[int]) -> None:
    """One batch in each run, and then the rest: every row comes once."""
    rows, seen, state = [row(i) for i in range(11)], list[int](), None
    for number, size in enumerate(sizes):
        batches = BucketBatchSampler(LENGTHS, size, shuffle=True, seed=7)
        run = BatchLoader(rows, SequenceBatch.collate, batches)
        if state is not None:
            run.load_state_dict(state)
        count = None if number == len(sizes) - 1 else 1
        seen += [index for batch in rows_of(list(islice(run, count))) for index in batch]
        state = run.state_dict()
    assert sorted(seen) == list(range(11))
    assert state == {"position": 0, "parts": []}


def batches_of(*terms: int) -> list[SequenceBatch]:
    return [SequenceBatch.collate([EncodedResponse([1] * (count + 1), 1)]) for count in terms]


def test_loss_weights_by_hand() -> None:
    """A step of 4 batches with 1, 2, 3 and 10 terms: weight = terms * 4 / 16. A last step of 2: terms * 4 / (1 + 3).

    Lightning divides by 4 in the last step as well, and the weights of its 2 batches compensate for that.
    """
    weights = [batch.loss_weight for batch in with_loss_weights(iter(batches_of(1, 2, 3, 10, 1, 3)), per_step=4)]
    assert weights == [0.25, 0.5, 0.75, 2.5, 1.0, 3.0]


def test_weights_of_an_added_sft_loss_by_hand() -> None:
    """A step of 2 batches: 2 pairs whose chosen responses have 1 and 3 tokens, and 1 pair with 8 tokens.

    loss_weight = 2 * 2 / 3 and 1 * 2 / 3; sft_loss_weight = 4 * 2 / 12 and 8 * 2 / 12. It is 0 without SFT terms.
    """

    def pairs(*tokens: int) -> PairBatch:
        rows = [EncodedResponse([1] * (count + 1), 1) for count in tokens]
        longer = [EncodedResponse([1] * 9, 1)] * len(rows)
        return PairBatch(SequenceBatch.collate([*rows, *longer]), torch.zeros(len(rows)))

    step = list(with_loss_weights(iter([pairs(1, 3), pairs(8)]), per_step=2))
    assert [batch.loss_weight for batch in step] == pytest.approx([4 / 3, 2 / 3])
    assert [batch.sft_loss_weight for batch in step] == pytest.approx([8 / 12, 16 / 12])
    assert [batch.sft_loss_weight for batch in with_loss_weights(iter(batches_of(1, 2)), per_step=2)] == [0.0, 0.0]


def test_without_accumulation_all_weights_are_one() -> None:
    assert [batch.loss_weight for batch in with_loss_weights(iter(batches_of(1, 7)), per_step=1)] == [1.0, 1.0]


def test_four_batches_are_equivalent_to_one_large_batch() -> None:
    """Four batches of 1, 2, 3 and 10 tokens: the sum of loss * loss_weight / 4 is the mean over all 16 tokens.

    With log-probs -k in batch k, the mean is (1 + 2 * 2 + 3 * 3 + 4 * 10) / 16 = 54 / 16 = 3.375. The mean of means
    would be (1 + 2 + 3 + 4) / 4 = 2.5.
    """
    loss = 0.0
    for k, batch in enumerate(with_loss_weights(iter(batches_of(1, 2, 3, 10)), per_step=4), start=1):
        loss += (
            float(cross_entropy_loss(torch.full(batch.response_mask.shape, -float(k)), batch.response_mask))
            * batch.loss_weight
            / 4
        )
    assert loss == 3.375


TWO_RANKS = """
import sys, torch.distributed as dist
from rlhf.data import EncodedResponse, SequenceBatch
from rlhf.data.loader import with_loss_weights
rank, terms = int(sys.argv[1]), [(1, 2), (3, 10)]
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
batches = [SequenceBatch.collate([EncodedResponse([1] * (count + 1), 1)]) for count in terms[rank]]
print([batch.loss_weight for batch in with_loss_weights(iter(batches), per_step=2, world=2)])
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_are_equivalent_to_one_large_batch(tmp_path: Path, repo: Path) -> None:
    """16 terms on 2 gloo ranks with 2 batches each: weight = terms * 2 * 2 / 16 = terms / 4."""
    ranks = [start_python(["-c", TWO_RANKS, str(rank), str(tmp_path / "meeting")], repo) for rank in range(2)]
    try:
        weights = [process.communicate(timeout=120)[0].strip() for process in ranks]
    finally:
        for process in ranks:
            kill_group(process.pid)
    assert weights == ["[0.25, 0.5]", "[0.75, 2.5]"]
