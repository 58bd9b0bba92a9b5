"""The losses of reward models, by hand."""

import math

import torch

from rlhf.reward.objective import bradley_terry_loss, regression_loss


def test_bradley_terry_by_hand() -> None:
    """Two pairs: differences 1 - 0 = 1 and 0 - 2 - (margin) 1 = -3.

    loss = (ln(1 + e^-1) + ln(1 + e^3)) / 2
    d loss / d chosen = -sigmoid(-difference) / 2 = -1 / (2 (1 + e^1)), -1 / (2 (1 + e^-3)); rejected: the opposite
    """
    chosen = torch.tensor([1.0, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, 2.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected, torch.tensor([0.0, 1.0]))
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    torch.testing.assert_close(loss, torch.tensor((math.log1p(math.exp(-1)) + math.log1p(math.exp(3))) / 2))
    expected = torch.tensor([-0.5 / (1 + math.exp(1)), -0.5 / (1 + math.exp(-3))])
    torch.testing.assert_close(gradients, (expected, -expected))


def test_bradley_terry_of_equal_scores_is_ln_2() -> None:
    """-ln sigmoid(0) = ln 2, and the mean over any number of such pairs is the same."""
    scores = torch.tensor([3.0, -1.0, 0.0])
    torch.testing.assert_close(bradley_terry_loss(scores, scores, torch.zeros(3)), torch.tensor(math.log(2)))


def test_bradley_terry_stays_finite_for_scores_far_apart() -> None:
    """A pair wrong by 1000 costs 1000 nats with gradient -1, where log(sigmoid(x)) would be minus infinity."""
    chosen = torch.tensor([0.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.tensor([1000.0]), torch.zeros(1))
    torch.testing.assert_close(loss, torch.tensor(1000.0))
    torch.testing.assert_close(torch.autograd.grad(loss, chosen)[0], torch.tensor([-1.0]))


def test_regression_by_hand() -> None:
    """Errors 1 and -2: loss (1 + 4) / 2 = 2.5; gradient 2 x error / 2 = 1 and -2."""
    scores = torch.tensor([1.5, 0.0], requires_grad=True)
    loss = regression_loss(scores, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(loss, torch.tensor(2.5))
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], torch.tensor([1.0, -2.0]))
