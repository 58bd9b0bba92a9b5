"""On-policy objectives, by hand and against independent implementations."""

import math
import random

import pytest
import torch
from torch import Tensor

from rlhf.rl.advantages import gae
from rlhf.rl.objective import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    policy_ratio,
    token_rewards,
)
from rlhf.tensors import sequence_mean

NAN, INF = math.nan, math.inf


def test_token_rewards_by_hand() -> None:
    """The score is added at the last response token. kl_coef is 0.5; masked tokens get 0, whatever their KL.

    row 0: KL 1 and -2, score 10 at the second token: -0.5, 1 + 10
    row 1: KL 4, score -3 at the only token: -2 - 3
    """
    kl = torch.tensor([[NAN, 1.0, -2.0, NAN], [INF, 4.0, NAN, -INF]])
    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])
    rewards = token_rewards(torch.tensor([10.0, -3.0]), kl, mask, kl_coef=0.5)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.5, 11.0, 0.0], [0.0, -5.0, 0.0, 0.0]]))


def test_gae_by_hand() -> None:
    """One prompt token, three response tokens, one padding token; gamma 0.5, lambda 0.5.

    rewards 1, 0, 4; values 2, 4, 1; the value after the last token is 0
    deltas   1 + 0.5 x 4 - 2 = 1,  0 + 0.5 x 1 - 4 = -3.5,  4 + 0 - 1 = 3
    A_3 = 3,  A_2 = -3.5 + 0.25 x 3 = -2.75,  A_1 = 1 + 0.25 x -2.75 = 0.3125;  returns: A + V
    """
    rewards = torch.tensor([[NAN, 1.0, 0.0, 4.0, NAN]])
    values = torch.tensor([[INF, 2.0, 4.0, 1.0, NAN]])
    mask = torch.tensor([[False, True, True, True, False]])
    advantages, returns = gae(rewards, mask, values=values, gamma=0.5, gae_lambda=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.0, 0.3125, -2.75, 3.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.0, 2.3125, 1.25, 4.0, 0.0]]))


def ragged(seed: int) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    """Return rewards, values, mask, and the bounds of responses with random starts and ends; masked entries are NaN."""
    draw = random.Random(seed)
    bounds = [(start := draw.randrange(1, 8), draw.randrange(start + 1, 13)) for _ in range(16)]
    mask = torch.zeros(16, 12, dtype=torch.bool)
    for row, (start, end) in enumerate(bounds):
        mask[row, start:end] = True
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(16, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask, bounds


def test_gae_is_the_discounted_sum_of_deltas() -> None:
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, summed separately for each token of each response."""
    rewards, values, mask, bounds = ragged(0)
    gamma, gae_lambda = 0.97, 0.9
    expected = torch.zeros_like(rewards)
    for row, (start, end) in enumerate(bounds):
        r, v = rewards[row].tolist(), values[row].tolist()
        deltas = [r[t] + (gamma * v[t + 1] if t + 1 < end else 0.0) - v[t] for t in range(start, end)]
        for t in range(len(deltas)):
            expected[row, start + t] = sum((gamma * gae_lambda) ** l * d for l, d in enumerate(deltas[t:]))  # noqa: E741
    advantages, returns = gae(rewards, mask, values=values, gamma=gamma, gae_lambda=gae_lambda)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns[mask], (expected + values)[mask])
    assert returns[~mask].eq(0).all()


def test_returns_without_discount_are_the_rewards_to_go() -> None:
    """gamma = lambda = 1: the return of a token is the sum of the rewards from that token on."""
    rewards, values, mask, bounds = ragged(1)
    _, returns = gae(rewards, mask, values=values, gamma=1.0, gae_lambda=1.0)
    for row, (start, end) in enumerate(bounds):
        expected = [sum(rewards[row, t:end].tolist()) for t in range(start, end)]
        torch.testing.assert_close(returns[row, start:end].tolist(), expected)


def test_clipped_policy_loss_by_hand() -> None:
    """Four response tokens and two padding tokens, clip_range 0.2.

    ratio  advantage  ratio*A  clipped*A   min
     1.5      +1        1.5       1.2      1.2    clipped: gradient 0
     0.5      -1       -0.5      -0.8     -0.8    clipped: gradient 0
     1.5      -2       -3.0      -2.4     -3.0    not clipped: the ratio moved against the advantage
     1.1      +3        3.3       3.3      3.3    inside the clip range
     nan     nan                                  padding: ignored
     e^1000    1                                  padding: does not overflow
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
    """Clip range 0.2 below and 0.5 above. Ratios 1.4 and 1.6 with advantage 1 give 1.4 and 1.5; 0.7 with -1 gives -0.8.

    loss = -(1.4 + 1.5 - 0.8) / 3; only the first token is inside its range: gradient -1.4 / 3
    """
    logprobs = torch.tensor([[1.4, 1.6, 0.7]]).log().requires_grad_()
    advantages, mask = torch.tensor([[1.0, 1.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool)
    loss = clipped_policy_loss(logprobs, torch.zeros(1, 3), advantages, mask, clip_range=0.2, clip_range_high=0.5)
    torch.testing.assert_close(loss, torch.tensor(-2.1 / 3))
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], torch.tensor([[-1.4 / 3, 0.0, 0.0]]))


def test_dual_clip_by_hand() -> None:
    """Dual clip 3. Ratio 5 with advantage -2 gives -3 x 2 instead of -5 x 2; ratio 2 with -1 gives -2; ratio 5 with
    advantage +1 is clipped to 1.2, as without the dual clip.

    loss = -(-6 - 2 + 1.2) / 3; gradient of the second token: 2 / 3
    """
    logprobs = torch.tensor([[5.0, 2.0, 5.0]]).log().requires_grad_()
    advantages, mask = torch.tensor([[-2.0, -1.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    loss = clipped_policy_loss(logprobs, torch.zeros(1, 3), advantages, mask, clip_range=0.2, dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor(6.8 / 3))
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], torch.tensor([[0.0, 2 / 3, 0.0]]))


def test_sequence_mean_gives_responses_equal_weight() -> None:
    """Ratios 1, advantages 3, 1 and 5 in responses of 2 tokens and 1 token.

    policy loss: token_mean -(3 + 1 + 5) / 3, sequence_mean -((3 + 1) / 2 + 5) / 2
    value errors 1, 3 and 2: sequence_mean ((1 + 9) / 2 + 4) / 2 = 4.5, half of it 2.25
    """
    mask = torch.tensor([[True, True], [True, False]])
    zeros, advantages = torch.zeros(2, 2), torch.tensor([[3.0, 1.0], [5.0, NAN]])
    loss = clipped_policy_loss(zeros, zeros, advantages, mask, clip_range=0.2)
    by_sequence = clipped_policy_loss(zeros, zeros, advantages, mask, clip_range=0.2, loss_reduction=sequence_mean)
    torch.testing.assert_close((loss, by_sequence), (torch.tensor(-3.0), torch.tensor(-3.5)))
    values = torch.tensor([[1.0, 3.0], [2.0, INF]])
    value_loss = clipped_value_loss(values, zeros, zeros, mask, clip_range=None, loss_reduction=sequence_mean)
    torch.testing.assert_close(value_loss, torch.tensor(2.25))


def test_policy_ratio_is_one_on_padding() -> None:
    """exp(0.5 - 0.2) on the response token; large or undefined differences on padding are masked before exp."""
    logprobs, old = torch.tensor([[0.5, 900.0, NAN]]), torch.tensor([[0.2, -900.0, 0.0]])
    ratio = policy_ratio(logprobs, old, torch.tensor([[True, False, False]]))
    torch.testing.assert_close(ratio, torch.tensor([[math.exp(0.3), 1.0, 1.0]]))


def test_clipped_value_loss_by_hand() -> None:
    """Clip range 0.5, old values 0; NaN on padding.

    value  return  error^2  clipped value  clipped error^2   max
     2.0     3.0    1.0          0.5            6.25        6.25    clipped: gradient 0
     2.0    -1.0    9.0          0.5            2.25        9.0     not clipped: gradient 0.5 x 2 x 3 / 3 = 1
     0.25    1.0    0.5625       0.25           0.5625      0.5625  inside the range: 0.5 x 2 x -0.75 / 3 = -0.25
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
    """Errors 2 and -4, NaN and infinity on padding: 0.5 x (4 + 16) / 2 = 5; gradient error / 2 = 1, -2."""
    values = torch.tensor([[3.0, 0.0, NAN]], requires_grad=True)
    returns, old = torch.tensor([[1.0, 4.0, INF]]), torch.tensor([[100.0, -100.0, NAN]])
    loss = clipped_value_loss(values, old, returns, torch.tensor([[True, True, False]]), clip_range=None)
    torch.testing.assert_close(loss, torch.tensor(5.0))
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0], torch.tensor([[1.0, -2.0, 0.0]]))


def test_explained_variance_by_hand() -> None:
    """Returns 0, 2, 4 have variance 8/3; NaN on padding is ignored.

    values 0, 2, 4: residuals 0: 1            values 2, 2, 2: residual variance 8/3: 0
    values 0, 1, 2: residuals 0, 1, 2 of variance 2/3: 1 - 1/4
    values 5, 7, 9: residuals -5 of variance 0: 1

    The same holds for returns that are 1000 times as small.
    """
    returns = torch.tensor([[0.0, 2.0, 4.0, NAN]])
    mask = torch.tensor([[True, True, True, False]])
    for values, expected in (([0.0, 2, 4], 1.0), ([2.0, 2, 2], 0.0), ([0.0, 1, 2], 0.75), ([5.0, 7, 9], 1.0)):
        for scale in (1.0, 1e-3):
            got = explained_variance(torch.tensor([[*values, INF]]) * scale, returns * scale, mask)
            torch.testing.assert_close(got, torch.tensor(expected))


@pytest.mark.parametrize("returns", [[0.0] * 3, [5.0] * 3, [1.0, 1.0000001, 0.9999999], [1e-8, 2e-8, 3e-8]])
def test_explained_variance_of_equal_returns_is_undefined(returns: list[float]) -> None:
    """The variance of the returns is 0 up to rounding; the values have variance 2/3. The padding differs."""
    values, mask = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([[True, True, True, False]])
    assert explained_variance(values, torch.tensor([[*returns, 9.0]]), mask).isnan()
