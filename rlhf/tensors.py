"""Tensor arithmetic every stage shares. All tensors of tokens are [batch, time]; entry t speaks of token t.

Masks come before everything else: what stands on a masked slot, NaN included, reaches neither a value nor a gradient.
"""

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the entries where ``mask`` is True; 0 where there are none.

    Args:
        values: [any shape], any unit.
        mask: [the same shape], bool.

    Returns:
        [], the unit of ``values``.
    """
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over rows of each row's mean over its True entries, so that long and short rows count alike.

    Args:
        values: [batch, time], any unit.
        mask: [batch, time], bool.

    Returns:
        [], the unit of ``values``.
    """
    return (masked_sum(values, mask) / mask.sum(dim=1).clamp(min=1)).mean()


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over time of the entries where ``mask`` is True: [batch, time] to [batch]."""
    return torch.where(mask, values, 0.0).sum(dim=1)


def masked_scale(values: Tensor, mask: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """Distances from the mean divided by the standard deviation, both over the True entries; the mean stays.

    Args and returns: as for masked_whiten, but the unit stays that of ``values``.

    Source: Huang et al. 2024, detail 8 of PPO, whitening of rewards without shift (arXiv:2403.17031).
    """
    mean = masked_mean(values, mask)
    return torch.where(mask, masked_whiten(values, mask, epsilon=epsilon) + mean, 0.0)


def masked_whiten(values: Tensor, mask: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """Values less their mean, divided by their standard deviation, both over the True entries only.

    Args:
        values: [batch, time], any unit.
        mask: [batch, time], bool.
        epsilon: added to the variance, so that equal values become 0.

    Returns:
        [batch, time], standard deviations; 0 on masked entries.

    Source: Huang et al. 2024, detail 20 of PPO (arXiv:2403.17031); unlike some peers the mean is not added back.
    """
    centred = torch.where(mask, values - masked_mean(values, mask), 0.0)
    return centred * torch.rsqrt(masked_mean(centred.square(), mask) + epsilon)


def discounted_cumsum(values: Tensor, mask: Tensor, discount: float) -> Tensor:
    """Each entry with all later ones of its row, the further off the less: ``S_t = x_t + discount S_{t+1}``.

    Args:
        values: [batch, time], any unit.
        mask: [batch, time], bool; its True entries stand together.
        discount: a step; 1 gives plain sums.

    Returns:
        [batch, time], the unit of ``values``; 0 on masked entries.
    """
    sums = torch.zeros_like(values)
    later = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        later = torch.where(mask[:, t], values[:, t] + discount * later, 0.0)
        sums[:, t] = later
    return sums


def states_before(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden states from which the masked tokens are predicted: the next-token shift of this project.

    A causal model reads tokens 0..t-1 and predicts token t from the state at t-1.

    Args:
        hidden: [batch, time, width], the state after each token.
        mask: [batch, time], bool; column 0 must be False (nothing stands before the first token).

    Returns:
        [masked tokens, width], row by row.
    """
    row, column = mask.nonzero(as_tuple=True)
    return hidden[row, column - 1]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Put one value a masked token, [masked tokens], back into [batch, time]; 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def last_true(mask: Tensor) -> Tensor:
    """Index of the last True entry of each row: [batch, time] bool to [batch]; found by place, never by token id."""
    return mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(dim=1)


def pad_right(rows: list[list[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Lists of token ids as one right-padded tensor and the mask of its real tokens, both [batch, time]."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(width) < lengths[:, None]
