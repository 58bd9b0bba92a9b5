"""Arithmetic by hand for what every stage shares."""

import pytest
import torch
from torch import Tensor, nan

from rlhf.tensors import (
    discounted_cumsum,
    last_true,
    masked_mean,
    masked_scale,
    masked_sum,
    masked_whiten,
    pad_right,
    scatter,
    sequence_mean,
    states_before,
)

MASK = torch.tensor([[True, True, False], [False, True, True]])
VALUES = torch.tensor([[1.0, 2.0, nan], [torch.inf, 4.0, 5.0]])  # NaN and infinity stand on padding


def test_masked_mean_by_hand() -> None:
    """(1 + 2 + 4 + 5) / 4 = 3; the mean over no entry is 0 and not NaN."""
    assert masked_mean(VALUES, MASK) == 3
    assert masked_mean(VALUES, torch.zeros_like(MASK)) == 0


def test_masked_sum_by_hand() -> None:
    """Row sums 1 + 2 = 3 and 4 + 5 = 9."""
    assert masked_sum(VALUES, MASK).tolist() == [3, 9]


def test_masked_whiten_by_hand_removes_the_mean() -> None:
    """Mean 3, differences -2 -1 1 2, variance (4 + 1 + 1 + 4) / 4 = 2.5; the mean is not added back."""
    white = masked_whiten(VALUES, MASK)
    expected = torch.tensor([[-2.0, -1.0, 0.0], [0.0, 1.0, 2.0]]) / 2.5**0.5
    torch.testing.assert_close(white, expected)
    assert white.sum().abs() < 1e-6


def test_masked_whiten_of_equal_values_is_zero() -> None:
    """No spread: 0 / sqrt(0 + epsilon) = 0, also for a single token."""
    assert masked_whiten(torch.full((2, 3), 7.0), MASK).tolist() == [[0.0] * 3] * 2
    assert masked_whiten(torch.tensor([[7.0]]), torch.tensor([[True]])).tolist() == [[0.0]]


@pytest.mark.parametrize("function", [masked_mean, masked_sum, masked_whiten])
@pytest.mark.parametrize("garbage", [nan, torch.inf, 1e30])
def test_garbage_under_the_mask_changes_no_value_and_no_gradient(function, garbage: float) -> None:
    """Values and gradients are those of clean padding; on padding the gradient is 0 (nan * 0 is NaN)."""

    def run(padding: float) -> tuple[Tensor, Tensor]:
        values = torch.where(MASK, torch.tensor([[1.0, 2.0, 0.0], [0.0, 4.0, 5.0]]), padding).requires_grad_()
        result = function(values, MASK)
        (result * torch.arange(1.0, 1 + result.numel()).reshape(result.shape)).sum().backward()
        return result.detach(), values.grad

    (clean, clean_gradient), (dirty, dirty_gradient) = run(0.0), run(garbage)
    assert torch.equal(dirty, clean)
    assert torch.equal(dirty_gradient, clean_gradient)
    assert (dirty_gradient[~MASK] == 0).all()


def test_masked_mean_gradient_by_hand() -> None:
    """d mean / d value = 1 / 4 on each of the 4 real entries."""
    values = torch.ones(2, 3, requires_grad=True)
    masked_mean(values, MASK).backward()
    assert torch.equal(values.grad, MASK * 0.25)


def test_states_before_is_the_next_token_shift() -> None:
    """Tokens 2 of row 0 and 1, 3 of row 1 are predicted from the states at 1, and at 0, 2; state 10 r + t is unique."""
    hidden = torch.tensor([[[0.0], [1], [2], [3]], [[10], [11], [12], [13]]])
    mask = torch.tensor([[False, False, True, False], [False, True, False, True]])
    assert states_before(hidden, mask)[:, 0].tolist() == [1, 10, 12]


def test_scatter_puts_the_values_back_row_by_row() -> None:
    """Four values into the four True places, in reading order, gradient included; 0 elsewhere."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    placed = scatter(values, MASK)
    assert placed.tolist() == [[1, 2, 0], [0, 3, 4]]
    (placed * torch.tensor([[1.0, 10.0, 7.0], [7.0, 100.0, 1000.0]])).sum().backward()
    assert values.grad.tolist() == [1, 10, 100, 1000]
    assert scatter(torch.tensor([True, False, True, True]), MASK).dtype == torch.bool


def test_last_true_goes_by_place_and_not_by_token() -> None:
    """With pad = eos an EOS also stands inside the prompt: only the mask knows the last token."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert last_true(mask).tolist() == [2, 4, 0, 4]


def test_last_true_of_a_long_row() -> None:
    """1000 tokens: an index that does not fit in 8 bits."""
    assert last_true(torch.arange(1000)[None] < 998).tolist() == [997]


def test_pad_right_by_hand() -> None:
    """The mask goes by length: a real token that equals the pad value stays real."""
    tokens, mask = pad_right([[5, 0], [1, 2, 3], []], value=0)
    assert tokens.tolist() == [[5, 0, 0], [1, 2, 3], [0, 0, 0]]
    assert mask.tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    assert (tokens.dtype, mask.dtype) == (torch.long, torch.bool)


def test_masked_scale_keeps_the_mean() -> None:
    """1, 3, 5 have mean 3 and deviation sqrt(8/3): 3 + (x - 3) / sqrt(8/3); padding is 0 and not seen."""
    values = torch.tensor([[1.0, 3.0, float("nan")], [5.0, float("inf"), 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    step = 2 / (8 / 3) ** 0.5
    expected = torch.tensor([[3 - step, 3.0, 0.0], [3 + step, 0.0, 0.0]])
    torch.testing.assert_close(masked_scale(values, mask), expected)


def test_mean_of_rows_weighs_rows_alike() -> None:
    """(1 + 3) / 2 and 5: mean 3.5."""
    values = torch.tensor([[1.0, 3.0, float("nan")], [5.0, float("inf"), 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(sequence_mean(values, mask), torch.tensor(3.5))


def test_discounted_to_go_by_hand() -> None:
    """Discount 0.5 over 2, 4, 8 after a masked slot: 8, 4 + 4 = 8, 2 + 4 = 6; what stands outside is not seen."""
    values = torch.tensor([[nan, 2.0, 4.0, 8.0, nan], [torch.inf, 3.0, nan, nan, nan]])
    mask = torch.tensor([[False, True, True, True, False], [False, True, False, False, False]])
    expected = torch.tensor([[0.0, 6.0, 8.0, 8.0, 0.0], [0.0, 3.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(discounted_cumsum(values, mask, 0.5), expected)
