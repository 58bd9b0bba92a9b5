"""The arithmetic of learning from one's own answers, by hand and against independent code."""

import math
import random

import torch
from torch import Tensor

from rlhf.rl.objective import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    policy_ratio,
    token_rewards,
)
from rlhf.tensors import sequence_mean

NAN, INF = math.nan, math.inf


def test_token_rewards_put_the_score_at_the_last_answer_token() -> None:
    """kl_coef 0.5; a prompt token (or padding) is worth nothing, whatever stands there.

    row 0: KL 1, -2; score 10 at its second token: -0.5, 1 + 10
    row 1: KL 4; score -3 at its only token: -2 - 3
    """
    kl = torch.tensor([[NAN, 1.0, -2.0, NAN], [INF, 4.0, NAN, -INF]])
    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])
    rewards = token_rewards(torch.tensor([10.0, -3.0]), kl, mask, kl_coef=0.5)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.5, 11.0, 0.0], [0.0, -5.0, 0.0, 0.0]]))


def test_gae_by_hand() -> None:
    """Three tokens after a prompt token, padding behind; gamma 0.5, lambda 0.5.

    rewards 1, 0, 4; values 2, 4, 1; the value after the end is 0
    deltas   1 + 0.5 x 4 - 2 = 1,  0 + 0.5 x 1 - 4 = -3.5,  4 + 0 - 1 = 3
    A_3 = 3,  A_2 = -3.5 + 0.25 x 3 = -2.75,  A_1 = 1 + 0.25 x -2.75 = 0.3125;  returns: A + V
    """
    rewards = torch.tensor([[NAN, 1.0, 0.0, 4.0, NAN]])
    values = torch.tensor([[INF, 2.0, 4.0, 1.0, NAN]])
    mask = torch.tensor([[False, True, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.0, 0.3125, -2.75, 3.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.0, 2.3125, 1.25, 4.0, 0.0]]))


def ragged(seed: int) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    """Rewards, values and mask of answers with random beginnings and ends, NaN outside; and these bounds."""
    draw = random.Random(seed)
    bounds = [(start := draw.randrange(1, 8), draw.randrange(start + 1, 13)) for _ in range(16)]
    mask = torch.zeros(16, 12, dtype=torch.bool)
    for row, (start, end) in enumerate(bounds):
        mask[row, start:end] = True
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(16, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask, bounds


def test_gae_is_the_discounted_sum_of_deltas() -> None:
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, summed anew for each token of each ragged answer."""
    rewards, values, mask, bounds = ragged(0)
    gamma, gae_lambda = 0.97, 0.9
    expected = torch.zeros_like(rewards)
    for row, (start, end) in enumerate(bounds):
        r, v = rewards[row].tolist(), values[row].tolist()
        deltas = [r[t] + (gamma * v[t + 1] if t + 1 < end else 0.0) - v[t] for t in range(start, end)]
        for t in range(len(deltas)):
            expected[row, start + t] = sum((gamma * gae_lambda) ** l * d for l, d in enumerate(deltas[t:]))  # noqa: E741
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns[mask], (expected + values)[mask])
    assert returns[~mask].eq(0).all()


def test_returns_without_discount_are_the_rewards_to_go() -> None:
    """gamma = lambda = 1: the return of a token is the sum of the rewards from it on, whatever the critic says."""
    rewards, values, mask, bounds = ragged(1)
    _, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    for row, (start, end) in enumerate(bounds):
        expected = [sum(rewards[row, t:end].tolist()) for t in range(start, end)]
        torch.testing.assert_close(returns[row, start:end].tolist(), expected)


def test_clipped_policy_loss_by_hand() -> None:
    """Four answer tokens and two of padding, clip 0.2.

    ratio  advantage  ratio*A  clamp(ratio)*A  earned = min
     1.5      +1        1.5         1.2            1.2    right direction, capped: gradient 0
     0.5      -1       -0.5        -0.8           -0.8    right direction, capped: gradient 0
     1.5      -2       -3.0        -2.4           -3.0    wrong direction, full price
     1.1      +3        3.3         3.3            3.3    inside
     nan     nan                                          padding: must not be seen
     e^1000    1                                          padding: must not overflow
    loss = -(1.2 - 0.8 - 3.0 + 3.3) / 4;  d loss / d logprob = -ratio*A / 4 = 0.75 and -0.825 for tokens 3 and 4
    """
    ratios = torch.tensor([[1.5, 0.5, 1.5, 1.1]])
    padding = torch.tensor([[NAN, 1000.0]])
    logprobs = torch.cat([ratios.log(), padding], dim=1).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, -2.0, 3.0, NAN, 1.0]])
    mask = torch.tensor([[True] * 4 + [False] * 2])
    loss = clipped_policy_loss(logprobs, torch.zeros(1, 6), advantages, mask, clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(loss, torch.tensor(-0.7 / 4))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 0.75, -0.825, 0.0, 0.0]]))


def test_two_clip_ranges_by_hand() -> None:
    """Clip 0.2 below and 0.5 above: ratios 1.4 and 1.6 with advantage 1 earn 1.4 and 1.5; 0.7 with -1 costs 0.8.

    loss = -(1.4 + 1.5 - 0.8) / 3; only the first token is inside its range: gradient -1.4 / 3
    """
    logprobs = torch.tensor([[1.4, 1.6, 0.7]]).log().requires_grad_()
    advantages, mask = torch.tensor([[1.0, 1.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool)
    loss = clipped_policy_loss(logprobs, torch.zeros(1, 3), advantages, mask, clip_range=0.2, clip_range_high=0.5)
    torch.testing.assert_close(loss, torch.tensor(-2.1 / 3))
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], torch.tensor([[-1.4 / 3, 0.0, 0.0]]))


def test_dual_clip_by_hand() -> None:
    """Dual clip 3. Ratio 5 with advantage -2 costs 3 x 2 instead of 5 x 2; ratio 2 with -1 costs its 2; ratio 5 with
    advantage +1 is capped by the clip range at 1.2, as ever.

    loss = -(-6 - 2 + 1.2) / 3; gradient of the second token: 2 / 3
    """
    logprobs = torch.tensor([[5.0, 2.0, 5.0]]).log().requires_grad_()
    advantages, mask = torch.tensor([[-2.0, -1.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    loss = clipped_policy_loss(logprobs, torch.zeros(1, 3), advantages, mask, clip_range=0.2, dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor(6.8 / 3))
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], torch.tensor([[0.0, 2 / 3, 0.0]]))


def test_losses_by_answer_weigh_answers_alike() -> None:
    """Ratios 1, advantages 3, 1 and 5 in answers of 2 tokens and 1: by token -(9 / 3), by answer -(2 + 5) / 2.

    The critic's errors 1, 3 and 2: half of the mean of (1 + 9) / 2 and 4 = 2.25.
    """
    mask = torch.tensor([[True, True], [True, False]])
    zeros, advantages = torch.zeros(2, 2), torch.tensor([[3.0, 1.0], [5.0, NAN]])
    loss = clipped_policy_loss(zeros, zeros, advantages, mask, clip_range=0.2)
    by_answer = clipped_policy_loss(zeros, zeros, advantages, mask, clip_range=0.2, average=sequence_mean)
    torch.testing.assert_close((loss, by_answer), (torch.tensor(-3.0), torch.tensor(-3.5)))
    values = torch.tensor([[1.0, 3.0], [2.0, INF]])
    value_loss = clipped_value_loss(values, zeros, zeros, mask, clip_range=None, average=sequence_mean)
    torch.testing.assert_close(value_loss, torch.tensor(2.25))


def test_policy_ratio_is_one_on_padding() -> None:
    """exp(0.5 - 0.2) on the answer; exp of a large or undefined difference is never taken elsewhere."""
    logprobs, old = torch.tensor([[0.5, 900.0, NAN]]), torch.tensor([[0.2, -900.0, 0.0]])
    ratio = policy_ratio(logprobs, old, torch.tensor([[True, False, False]]))
    torch.testing.assert_close(ratio, torch.tensor([[math.exp(0.3), 1.0, 1.0]]))


def test_clipped_value_loss_by_hand() -> None:
    """Clip 0.5, old value 0 everywhere; NaN on padding.

    value  return  plain error^2  near  clipped error^2  worse
     2.0     3.0       1.0         0.5       6.25         6.25   clipped: gradient 0
     2.0    -1.0       9.0         0.5       2.25         9.0    plain:   gradient 0.5 x 2 x 3 / 3 = 1
     0.25    1.0       0.5625      0.25      0.5625       0.5625 inside:  gradient 0.5 x 2 x -0.75 / 3 = -0.25
    loss = 0.5 x 15.8125 / 3
    """
    values = torch.tensor([[2.0, 2.0, 0.25, NAN]], requires_grad=True)
    returns = torch.tensor([[3.0, -1.0, 1.0, NAN]])
    old, mask = torch.tensor([[0.0, 0.0, 0.0, INF]]), torch.tensor([[True, True, True, False]])
    loss = clipped_value_loss(values, old, returns, mask, clip_range=0.5)
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(loss, torch.tensor(0.5 * 15.8125 / 3))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 1.0, -0.25, 0.0]]))


def test_value_loss_without_clipping_is_half_the_squared_error() -> None:
    """Errors 2 and -4, and garbage on padding: 0.5 x (4 + 16) / 2 = 5; gradient error / 2 = 1, -2."""
    values = torch.tensor([[3.0, 0.0, NAN]], requires_grad=True)
    returns, old = torch.tensor([[1.0, 4.0, INF]]), torch.tensor([[100.0, -100.0, NAN]])
    loss = clipped_value_loss(values, old, returns, torch.tensor([[True, True, False]]), clip_range=None)
    torch.testing.assert_close(loss, torch.tensor(5.0))
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0], torch.tensor([[1.0, -2.0, 0.0]]))


def test_explained_variance_by_hand() -> None:
    """Returns 0, 2, 4 have variance 8/3; NaN on padding is not seen.

    perfect values: 1.  The mean everywhere: 0.  Values 0, 1, 2 leave 0, 1, 2 of variance 2/3: 1 - 1/4.
    An error that is the same everywhere leaves no variance: 1.
    """
    returns = torch.tensor([[0.0, 2.0, 4.0, NAN]])
    mask = torch.tensor([[True, True, True, False]])
    for values, expected in (([0.0, 2, 4], 1.0), ([2.0, 2, 2], 0.0), ([0.0, 1, 2], 0.75), ([5.0, 7, 9], 1.0)):
        got = explained_variance(torch.tensor([[*values, INF]]), returns, mask)
        torch.testing.assert_close(got, torch.tensor(expected))
