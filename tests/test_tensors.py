"""Masked tensor arithmetic, computed by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nan

from ranks import in_ranks
from rlhf.tensors import (
    discounted_cumsum,
    last_true,
    masked_mean,
    masked_scale,
    masked_sum,
    masked_variance,
    masked_whiten,
    pad_right,
    scatter,
    sequence_mean,
    sequence_sum,
)

MASK = torch.tensor([[True, True, False], [False, True, True]])
VALUES = torch.tensor([[1.0, 2.0, nan], [torch.inf, 4.0, 5.0]])  # NaN and infinity are on masked entries


def test_masked_mean_by_hand() -> None:
    """(1 + 2 + 4 + 5) / 4 = 3. The mean of no entries is 0, not NaN."""
    assert masked_mean(VALUES, MASK) == 3
    assert masked_mean(VALUES, torch.zeros_like(MASK)) == 0


def test_masked_sum_by_hand() -> None:
    """The row sums are 1 + 2 = 3 and 4 + 5 = 9."""
    assert masked_sum(VALUES, MASK).tolist() == [3, 9]


def test_masked_whiten_by_hand_removes_the_mean() -> None:
    """Mean 3, differences -2, -1, 1, 2, variance (4 + 1 + 1 + 4) / 4 = 2.5. The mean is not added back."""
    white = masked_whiten(VALUES, MASK)
    expected = torch.tensor([[-2.0, -1.0, 0.0], [0.0, 1.0, 2.0]]) / 2.5**0.5
    torch.testing.assert_close(white, expected)
    assert white.sum().abs() < 1e-6


def test_masked_whiten_of_equal_values_is_zero() -> None:
    """0 / sqrt(0 + epsilon) = 0, also for a single token."""
    assert masked_whiten(torch.full((2, 3), 7.0), MASK).tolist() == [[0.0] * 3] * 2
    assert masked_whiten(torch.tensor([[7.0]]), torch.tensor([[True]])).tolist() == [[0.0]]


@pytest.mark.parametrize("value", [0.7312, -7.77, 33.3, 1e5 + 0.3])
def test_the_rounding_error_of_the_mean_is_not_whitened(value: float) -> None:
    """The float32 mean of 5,000 equal values differs from them. Whitening would scale this difference up by 1e4."""
    values = torch.full((1000, 5), value)
    assert masked_whiten(values, torch.ones_like(values, dtype=torch.bool)).abs().max() < 1e-6


@pytest.mark.parametrize("function", [masked_mean, masked_sum, masked_whiten])
@pytest.mark.parametrize("masked", [nan, torch.inf, 1e30])
def test_masked_values_affect_neither_results_nor_gradients(
    function: Callable[[Tensor, Tensor], Tensor], masked: float
) -> None:
    """Both equal those with zeros on masked entries, whose gradient is 0, even though NaN * 0 is NaN."""

    def run(padding: float) -> tuple[Tensor, Tensor]:
        values = torch.where(MASK, torch.tensor([[1.0, 2.0, 0.0], [0.0, 4.0, 5.0]]), padding).requires_grad_()
        result = function(values, MASK)
        (result * torch.arange(1.0, 1 + result.numel()).reshape(result.shape)).sum().backward()
        return result.detach(), values.grad

    (clean, clean_gradient), (dirty, dirty_gradient) = run(0.0), run(masked)
    assert torch.equal(dirty, clean)
    assert torch.equal(dirty_gradient, clean_gradient)
    assert (dirty_gradient[~MASK] == 0).all()


def test_masked_mean_gradient_by_hand() -> None:
    """d mean / d value = 1 / 4 on each of the 4 real entries."""
    values = torch.ones(2, 3, requires_grad=True)
    masked_mean(values, MASK).backward()
    assert torch.equal(values.grad, MASK * 0.25)


def test_scatter_fills_the_mask_row_by_row() -> None:
    """Four values for the four True entries, and 0 elsewhere. Gradients flow back to the values."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    scattered = scatter(values, MASK)
    assert scattered.tolist() == [[1, 2, 0], [0, 3, 4]]
    (scattered * torch.tensor([[1.0, 10.0, 7.0], [7.0, 100.0, 1000.0]])).sum().backward()
    assert values.grad.tolist() == [1, 10, 100, 1000]
    assert scatter(torch.tensor([True, False, True, True]), MASK).dtype == torch.bool


def test_last_true_by_hand() -> None:
    """Rows that are padded on the right, padded on the left, almost empty, and full."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert last_true(mask).tolist() == [2, 4, 0, 4]


def test_last_true_of_a_long_row() -> None:
    """The index 997 does not fit into 8 bits."""
    assert last_true(torch.arange(1000)[None] < 998).tolist() == [997]


def test_pad_right_by_hand() -> None:
    """The mask depends on lengths, so a real token may equal the padding value."""
    input_ids, mask = pad_right([[5, 0], [1, 2, 3], []], value=0)
    assert input_ids.tolist() == [[5, 0, 0], [1, 2, 3], [0, 0, 0]]
    assert mask.tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    assert (input_ids.dtype, mask.dtype) == (torch.long, torch.bool)


def test_masked_scale_keeps_the_mean() -> None:
    """1, 3 and 5 have mean 3 and standard deviation sqrt(8 / 3), so x becomes 3 + (x - 3) / sqrt(8 / 3)."""
    values = torch.tensor([[1.0, 3.0, float("nan")], [5.0, float("inf"), 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    step = 2 / (8 / 3) ** 0.5
    expected = torch.tensor([[3 - step, 3.0, 0.0], [3 + step, 0.0, 0.0]])
    torch.testing.assert_close(masked_scale(values, mask), expected)


def test_sequence_mean_by_hand() -> None:
    """The row means (1 + 3) / 2 = 2 and 5 have the mean 3.5."""
    values = torch.tensor([[1.0, 3.0, float("nan")], [5.0, float("inf"), 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(sequence_mean(values, mask), torch.tensor(3.5))


def test_discounted_cumsum_by_hand() -> None:
    """2, 4, 8 with discount 0.5: 8, 4 + 0.5 * 8 = 8, 2 + 0.5 * 8 = 6. Masked entries are ignored."""
    values = torch.tensor([[nan, 2.0, 4.0, 8.0, nan], [torch.inf, 3.0, nan, nan, nan]])
    mask = torch.tensor([[False, True, True, True, False], [False, True, False, False, False]])
    expected = torch.tensor([[0.0, 6.0, 8.0, 8.0, 0.0], [0.0, 3.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(discounted_cumsum(values, mask, 0.5), expected)


def test_sequence_sum_by_hand() -> None:
    """The row sums 4 and 5, divided by 8, have the mean 9 / 16."""
    values = torch.tensor([[1.0, 3.0, float("nan")], [5.0, float("inf"), 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(sequence_sum(values, mask, length=8), torch.tensor(9 / 16))


def test_masked_variance_by_hand() -> None:
    """Mean 3, differences -2, -1, 1, 2: (4 + 1 + 1 + 4) / 4."""
    assert float(masked_variance(VALUES, MASK)) == 2.5


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.99, 1.0])
def test_discounted_cumsum_equals_the_recursion(discount: float) -> None:
    """S_t = x_t + discount S_{t+1} in float64, for responses of every length from 1 to 37."""
    values = torch.randn(37, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) < torch.arange(1, 38)[:, None] + 2
    mask[:, :2] = False
    expected = torch.zeros_like(values)
    later = torch.zeros(37, dtype=torch.float64)
    for t in range(39, -1, -1):
        later = torch.where(mask[:, t], values[:, t] + discount * later, 0.0)
        expected[:, t] = later
    torch.testing.assert_close(discounted_cumsum(values, mask, discount), expected)


def whiten_share(rank: int) -> dict[str, list[list[float]]]:
    """Whiten a row of each rank: the good responses are on rank 0, the bad ones on rank 1."""
    values = torch.tensor([[1.01, 0.99, 0.0]]) if rank == 0 else torch.tensor([[-1.0, -1.02, -0.98]])
    mask = torch.tensor([[True, True, rank == 1]])
    functions = {"whiten": masked_whiten, "scale": masked_scale}
    return {name: function(values, mask).tolist() for name, function in functions.items()}


def test_ranks_are_whitened_together() -> None:
    """Two ranks get the rows of one process with both rows; per rank, noise of 1% would be scaled to unit size."""
    values = torch.tensor([[1.01, 0.99, 0.0], [-1.0, -1.02, -0.98]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    first, second = in_ranks(whiten_share)
    for name, function in {"whiten": masked_whiten, "scale": masked_scale}.items():
        together = torch.tensor([*first[name], *second[name]])
        torch.testing.assert_close(together, function(values, mask))
