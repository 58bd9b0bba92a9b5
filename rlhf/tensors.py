"""Masked tensor arithmetic shared by all stages.

Per-token tensors have shape [batch, time], and entry t belongs to token t. Masks are applied before any arithmetic, so
masked values, including NaN, affect neither results nor gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.distributed import sum_over_ranks


def upload(values: object, device: torch.device | str) -> Tensor:
    """Copy a tensor or numbers from the host to a device, without waiting for the operations queued there.

    Args:
        values: A tensor on the host, or a sequence of numbers.
        device: The device.
    """
    return torch.as_tensor(values).to(device, non_blocking=True)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the unmasked entries, or 0 if there are none.

    Args:
        values: [any shape] values of any unit.
        mask: [same shape] bool, True on the entries to average.

    Returns:
        Scalar, in the unit of ``values``.
    """
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over rows of the masked mean of each row, so that long and short rows have equal weight.

    Args:
        values: [batch, time] values of any unit.
        mask: [batch, time] bool, True on the entries to average.

    Returns:
        Scalar, in the unit of ``values``.
    """
    return (masked_sum(values, mask) / mask.sum(dim=1).clamp(min=1)).mean()


def sequence_sum(values: Tensor, mask: Tensor, *, length: int) -> Tensor:
    """Mean over rows of the masked sum of each row, divided by a constant length.

    In contrast to ``sequence_mean``, a token has the same weight in a long row as in a short one.

    Args:
        values: [batch, time] values of any unit.
        mask: [batch, time] bool, True on the entries to sum.
        length: The constant that replaces the length of each row, in tokens.

    Returns:
        Scalar, in the unit of ``values``.

    Reference: Liu et al. 2025, "Dr. GRPO", the loss without length bias (arXiv:2503.20783).
    """
    return (masked_sum(values, mask) / length).mean()


def masked_fraction(hits: Tensor, mask: Tensor) -> Tensor:
    """Fraction of the True entries of ``mask`` that are also True in ``hits``; 0 if ``mask`` has none.

    Args:
        hits: [any shape], bool.
        mask: [same shape], bool.

    Returns:
        Scalar from 0 to 1.
    """
    return (hits & mask).sum() / mask.sum().clamp(min=1)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the unmasked entries of each row: [batch, time] to [batch]."""
    return torch.where(mask, values, 0.0).sum(dim=1)


def masked_scale(values: Tensor, mask: Tensor) -> Tensor:
    """Scale to unit variance over the unmasked entries of all ranks, keeping their mean.

        x' = mean + (x - mean) / sqrt(variance + 1e-8)

    Args:
        values: [batch, time] values of any unit.
        mask: [batch, time] bool, True on the entries to scale.

    Returns:
        [batch, time] scaled values; 0 on masked entries.

    Reference: Huang et al. 2024, detail 8 of PPO, whitening of rewards without shifting the mean (arXiv:2403.17031).
    """
    mean = mean_over_ranks(values, mask)
    return torch.where(mask, masked_whiten(values, mask) + mean, 0.0)


def masked_whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Shift to zero mean and scale to unit variance over the unmasked entries of all ranks.

        x' = (x - mean) / sqrt(variance + 1e-8)

    Every rank must call this function at the same time, because mean and variance are computed over all ranks.

    Args:
        values: [batch, time] values of any unit.
        mask: [batch, time] bool, True on the entries to whiten.

    Returns:
        [batch, time] whitened values, in standard deviations; 0 on masked entries.

    Reference: Huang et al. 2024, detail 20 of PPO (arXiv:2403.17031). Some implementations add the mean back; this
    one does not.
    """
    centered = _centered(values, mask)
    return centered * torch.rsqrt(mean_over_ranks(centered.square(), mask) + 1e-8)  # Equal values become 0.


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """Variance of the unmasked entries of all ranks: a scalar, in the squared unit of ``values``.

    Every rank must call this function at the same time.

    Args:
        values: [batch, time] values of any unit.
        mask: [batch, time] bool, True on the entries to include.
    """
    return mean_over_ranks(_centered(values, mask).square(), mask)


def _centered(values: Tensor, mask: Tensor) -> Tensor:
    """Subtract the mean of the unmasked entries of all ranks; 0 on masked entries."""
    centered = torch.where(mask, values - mean_over_ranks(values, mask), 0.0)
    # What is left of equal values is the rounding error of their mean, which whitening would scale up.
    return torch.where(mask, centered - mean_over_ranks(centered, mask), 0.0)


def mean_over_ranks(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the unmasked entries of all ranks, or 0 if there are none."""
    total = sum_over_ranks(torch.where(mask, values, 0.0).sum())
    return total / sum_over_ranks(mask.sum()).clamp(min=1)


def discounted_cumsum(values: Tensor, mask: Tensor, discount: float) -> Tensor:
    """Discounted sum of each entry and all later entries in its row.

        S_t = x_t + discount * S_{t+1}

    The sums are computed by doubling: after k steps, each sum covers 2^k entries.

    Args:
        values: [batch, time] values of any unit.
        mask: [batch, time] bool; the True entries of a row must be contiguous.
        discount: Discount factor per token; 1 gives plain sums.

    Returns:
        [batch, time] sums, in the unit of ``values``; 0 on masked entries.
    """
    sums = torch.where(mask, values, 0.0)
    covered = 1
    while covered < values.shape[1]:
        sums = sums + discount**covered * F.pad(sums[:, covered:], (0, covered))
        covered *= 2
    return torch.where(mask, sums, 0.0)


def true_positions(mask: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows and columns of the True entries, [count] each, row by row.

    Args:
        mask: [batch, time] bool.
        count: Number of True entries. None: unknown, so that the host waits for the device to count them.
    """
    if count is None:
        row, column = mask.nonzero(as_tuple=True)
        return row, column
    index = (~mask).flatten().to(torch.int8).argsort(stable=True)[:count]
    return index // mask.shape[1], index % mask.shape[1]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Write one value per selected token back into a [batch, time] tensor of zeros.

    Args:
        values: [selected tokens] values, row by row.
        mask: [batch, time] bool, True on the selected tokens.

    Returns:
        [batch, time] values; 0 on masked entries.
    """
    # In the backward pass of ``masked_scatter``, the host would wait for the device.
    index = (mask.flatten().cumsum(0) - 1).clamp(min=0).view(mask.shape)
    return torch.cat([values, values.new_zeros(1)])[index].masked_fill(~mask, 0)


def last_true(mask: Tensor) -> Tensor:
    """Index of the last True entry in each row: [batch, time] bool to [batch]."""
    return mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(dim=1)


def pad_right(rows: list[list[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Pad lists of token ids on the right.

    Args:
        rows: Lists of token ids.
        value: Token id of the padding. The mask depends on the lengths only, so this may also be a real token.

    Returns:
        [batch, time] token ids, and [batch, time] bool, True on real tokens.
    """
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return input_ids, torch.arange(width) < lengths[:, None]


def pad_rows_left(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids on the left with 0, and return the ids and a mask that is True on real tokens."""
    reversed_ids, reversed_mask = pad_right([row[::-1] for row in rows])
    return reversed_ids.flip(1), reversed_mask.flip(1)


def shape_of(value: object) -> str:
    """Describe a value by its shape, or by its type if it is not a tensor, for error messages."""
    return f"one of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
