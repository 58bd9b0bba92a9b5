"""The loss of supervised fine-tuning, by hand."""

import math

import torch

from rlhf.sft.objective import cross_entropy_loss


def test_cross_entropy_is_the_mean_over_tokens_not_over_sequences() -> None:
    """A response of one token and one of three; NaN and infinity on tokens that are not learned.

    loss = -(-1 - 2 - 3 - 6) / 4 = 3 (the mean of the means of both sequences would be (1 + 11/3) / 2);
    d loss / d logprob = -1/4 on the four tokens, 0 elsewhere.
    """
    nan = math.nan
    logprobs = torch.tensor([[nan, -1.0, math.inf, nan], [nan, -2.0, -3.0, -6.0]], requires_grad=True)
    mask = torch.tensor([[False, True, False, False], [False, True, True, True]])
    loss = cross_entropy_loss(logprobs, mask)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(loss, torch.tensor(3.0))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -0.25, 0.0, 0.0], [0.0, -0.25, -0.25, -0.25]]))
