"""Every row once an epoch, equal work for every rank, a place to go on from, and means that do not depend on cuts."""

import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

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
def test_every_row_comes_once_an_epoch(shuffle: bool, bucket: bool, batch_size: int) -> None:
    """11 rows in ceil(11 / size) batches, the length the loader promised, none longer than the size."""
    batches = BucketBatchSampler(LENGTHS, batch_size, shuffle=shuffle, bucket=bucket)
    for number in range(3):
        rows = epoch(batches, number)
        assert sorted(chain(*rows)) == list(range(11))
        assert len(rows) == len(batches) == -(-11 // min(batch_size, 11))
        assert max(map(len, rows)) <= batch_size


def test_the_order_differs_by_epoch_and_by_seed_and_nothing_else() -> None:
    """Resume in epoch 3 draws epoch 3's order, not the first one's; the global generator has no say."""
    lengths = list(range(100))
    first, again = BucketBatchSampler(lengths, 3, shuffle=True, seed=1), BucketBatchSampler(lengths, 3, shuffle=True, seed=1)
    orders = [epoch(first, number) for number in range(4)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert epoch(again, 3) == orders[3]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({str(order) for order in orders}) == 4
    assert epoch(BucketBatchSampler(lengths, 3, shuffle=True, seed=2)) != orders[0]


def test_without_shuffle_the_longest_come_first() -> None:
    """A batch that does not fit into memory shows at once: 50 49 48 47, 46 8 7 6, 5 4 3."""
    rows = epoch(BucketBatchSampler(LENGTHS, 4, shuffle=False))
    assert [[LENGTHS[i] for i in batch] for batch in rows] == [[50, 49, 48, 47], [46, 8, 7, 6], [5, 4, 3]]


def test_rows_of_like_length_share_a_batch() -> None:
    """400 rows of 1 to 400 tokens in batches of 4: putting like to like saves most of the padding."""

    def padding(bucket: bool) -> int:
        batches = BucketBatchSampler(list(range(1, 401)), 4, shuffle=True, bucket=bucket)
        return sum(len(rows) * (max(rows) + 1) - sum(row + 1 for row in rows) for rows in batches)

    assert padding(bucket=True) < padding(bucket=False) / 5


def test_a_small_set_meets_other_neighbours_each_epoch() -> None:
    """40 rows in batches of 2 fit into one window: sorted as a whole, the same two would always share a batch."""
    batches = BucketBatchSampler(list(range(40)), 2, shuffle=True)
    pairs = [{frozenset(rows) for rows in epoch(batches, number)} for number in range(2)]
    assert pairs[0] != pairs[1]


def test_whole_only_leaves_out_what_does_not_fill_a_batch() -> None:
    """11 rows in batches of 4: two whole batches, 3 rows wait, other ones each epoch."""
    batches = BucketBatchSampler(LENGTHS, 4, shuffle=True, bucket=False, drop_last=True)
    left_out = set()
    for number in range(6):
        rows = epoch(batches, number)
        assert [len(batch) for batch in rows] == [4, 4]
        assert len(batches) == 2
        left_out.add(frozenset(range(11)) - set(chain(*rows)))
    assert len(left_out) > 1


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("count", [8, 11, 13])
def test_ranks_share_the_rows_and_take_equal_steps(world: int, count: int) -> None:
    """Together the ranks see every row; a row is seen twice only where the last batch has fewer rows than ranks."""
    ranks = [BucketBatchSampler(list(range(count)), 2, shuffle=True, rank=rank, world=world) for rank in range(world)]
    orders = [epoch(rank, 1) for rank in ranks]
    assert {len(order) for order in orders} == {len(ranks[0])}
    assert all(batch for order in orders for batch in order)
    seen = list(chain(*chain(*orders)))
    assert sorted(set(seen)) == list(range(count))
    rest = count % (2 * world)
    assert len(seen) - count == (world - rest if 0 < rest < world else 0)


def test_more_ranks_than_rows_still_take_the_same_steps() -> None:
    """3 rows, 4 ranks: one step each, the fourth repeats a row and does not hang the others."""
    orders = [list(BucketBatchSampler([5, 5, 5], 2, shuffle=False, rank=rank, world=4)) for rank in range(4)]
    assert [len(order) for order in orders] == [1, 1, 1, 1]
    assert {row for order in orders for batch in order for row in batch} == {0, 1, 2}


def row(index: int) -> EncodedResponse:
    """Row i: token 10 + i, and an answer of i + 1 tokens."""
    return EncodedResponse([10 + index] * (index + 2), 1)


def loader(per_step: int = 1) -> BatchLoader:
    return BatchLoader(
        [row(i) for i in range(11)], SequenceBatch.collate, BucketBatchSampler(LENGTHS, 2, shuffle=True, seed=7), per_step
    )


def rows_of(batches: list[SequenceBatch]) -> list[list[int]]:
    return [(batch.input_ids[:, 0] - 10).tolist() for batch in batches]


@pytest.mark.parametrize("taken", [0, 1, 2, 4, 6])
def test_a_loader_goes_on_where_it_stopped(taken: int) -> None:
    """After ``taken`` of 6 batches of epoch 2, a new loader gives the rest of epoch 2, then all of epoch 3."""
    first = loader(per_step=2)
    first.batch_sampler.set_epoch(2)
    whole = rows_of(list(first))
    first.batch_sampler.set_epoch(3)
    following = rows_of(list(first))

    first.batch_sampler.set_epoch(2)
    stopped = iter(first)
    for _ in range(taken):
        next(stopped)
    second = loader(per_step=2)
    second.load_state_dict(first.state_dict() if taken else {"taken": 0})
    second.batch_sampler.set_epoch(2)
    if taken < 6:  # at the end of an epoch the next one begins from its start
        assert rows_of(list(second)) == whole[taken:]
    second.batch_sampler.set_epoch(3)
    assert rows_of(list(second)) == following


def test_a_resumed_loader_gives_the_same_shares() -> None:
    """Batches 2 and 3 make one optimizer step, whether or not 0 and 1 came before them in this process."""
    whole = [batch.loss_weight for batch in loader(per_step=2)]
    resumed = loader(per_step=2)
    resumed.load_state_dict({"taken": 2})
    assert [batch.loss_weight for batch in resumed] == whole[2:]
    assert len(set(whole)) > 1


def answers(*terms: int) -> list[SequenceBatch]:
    return [SequenceBatch.collate([EncodedResponse([1] * (count + 1), 1)]) for count in terms]


def test_shares_by_hand() -> None:
    """Terms 1, 2, 3, 10 in one step of 4: share = terms x 4 / 16; a last step of 2 batches: terms x 4 / (1 + 3).

    Lightning divides by 4 in the last step as well, so the shares of its 2 batches must make up for that.
    """
    shares = [batch.loss_weight for batch in with_loss_weights(iter(answers(1, 2, 3, 10, 1, 3)), per_step=4)]
    assert shares == [0.25, 0.5, 0.75, 2.5, 1.0, 3.0]


def test_shares_of_an_sft_term_by_hand() -> None:
    """Pairs whose chosen answers have 1 and 3, then 8 tokens: 2 + 1 pairs and 4 + 8 tokens in a step of 2 batches.

    share = 2 x 2 / 3 and 1 x 2 / 3; sft_loss_weight = 4 x 2 / 12 and 8 x 2 / 12. A batch without such a term has none of it.
    """

    def pairs(*tokens: int) -> PairBatch:
        rows = [EncodedResponse([1] * (count + 1), 1) for count in tokens]
        longer = [EncodedResponse([1] * 9, 1)] * len(rows)
        return PairBatch(SequenceBatch.collate([*rows, *longer]), torch.zeros(len(rows)))

    step = list(with_loss_weights(iter([pairs(1, 3), pairs(8)]), per_step=2))
    assert [batch.loss_weight for batch in step] == pytest.approx([4 / 3, 2 / 3])
    assert [batch.sft_loss_weight for batch in step] == pytest.approx([8 / 12, 16 / 12])
    assert [batch.sft_loss_weight for batch in with_loss_weights(iter(answers(1, 2)), per_step=2)] == [0.0, 0.0]


def test_without_accumulation_every_share_is_one() -> None:
    assert [batch.loss_weight for batch in with_loss_weights(iter(answers(1, 7)), per_step=1)] == [1.0, 1.0]


def test_four_batches_are_one_big_batch() -> None:
    """Loss -log p of rows with 1, 2, 3 and 10 tokens: sum over 4 of loss x share / 4 = mean over all 16 tokens.

    By hand with log-probs -k in row k: (1 + 2 x 2 + 3 x 3 + 4 x 10) / 16 = 54 / 16 = 3.375, where the mean of means
    would be (1 + 2 + 3 + 4) / 4 = 2.5.
    """
    loss = 0.0
    for k, batch in enumerate(with_loss_weights(iter(answers(1, 2, 3, 10)), per_step=4), start=1):
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
def test_two_ranks_are_one_big_batch(tmp_path: Path, repo: Path) -> None:
    """16 terms over 2 ranks x 2 batches: share = terms x 2 x 2 / 16 = terms / 4 on both sides of a real gloo group."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path / "meeting")],
            cwd=repo,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    shares = [process.communicate(timeout=120)[0].strip() for process in ranks]
    assert shares == ["[0.25, 0.5]", "[0.75, 2.5]"]
