"""Rollouts by hand."""

from dataclasses import replace

import torch

from rlhf.sampling import Rollout


def test_rollout_lengths_and_responses_by_hand() -> None:
    """Row 0: prompt [5], response [6, 2]. Row 1: prompt [7, 8], response [9] without EOS."""
    rollout = Rollout(
        input_ids=torch.tensor([[5, 6, 2], [7, 8, 9]]),
        attention_mask=torch.ones(2, 3, dtype=torch.bool),
        response_mask=torch.tensor([[False, True, True], [False, False, True]]),
        finished=torch.tensor([True, False]),
    )
    assert rollout.lengths.tolist() == [2, 1]
    assert rollout.response_ids() == [[6, 2], [9]]


def test_from_responses_by_hand() -> None:
    """Row 0: prompt [2, 5], response [6, 2]. Row 1: prompt [7], response [8]; token 2 ends a response."""
    rollout = Rollout.from_responses([[2, 5], [7]], [[6, 2], [8]], stop_ids=[2])
    assert rollout.input_ids[0].tolist() == [2, 5, 6, 2]
    assert rollout.input_ids[1, :2].tolist() == [7, 8]
    assert rollout.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert rollout.response_mask.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert rollout.finished.tolist() == [True, False]
    assert rollout.stop_ids == rollout.to("cpu").stop_ids == (2,)
    assert rollout.response_ids() == [[6, 2], [8]]


def test_response_ids_are_read_from_the_device_at_most_once() -> None:
    """A rollout of given responses needs no read. The ids of a copy with other tensors are its own."""
    rollout = Rollout.from_responses([[2, 5], [7]], [[6, 2], [8]], stop_ids=[2])
    other = replace(rollout, input_ids=rollout.input_ids + 1)
    assert other.response_ids() == [[7, 3], [9]]
    assert other.response_ids() is other.response_ids()
    rollout.input_ids = torch.empty(2, 4, device="meta")  # cannot be read
    assert rollout.response_ids() == [[6, 2], [8]]
