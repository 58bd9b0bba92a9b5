"""The losses of reward models, by hand."""

import math

import torch

from rlhf.reward.objective import bradley_terry_loss, centering_penalty, ensemble_std, regression_loss


def test_bradley_terry_loss_by_hand() -> None:
    """Two pairs: z = 1 - 0 - 0 = 1, and z = 0 - 2 - 1 = -3 with a margin of 1.

    loss = (ln(1 + e^-1) + ln(1 + e^3)) / 2
    d loss / d chosen = -sigmoid(-z) / 2 = -1 / (2 (1 + e^1)) and -1 / (2 (1 + e^-3)); d loss / d rejected: the negative
    """
    chosen = torch.tensor([1.0, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, 2.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected, torch.tensor([0.0, 1.0]))
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    torch.testing.assert_close(loss, torch.tensor((math.log1p(math.exp(-1)) + math.log1p(math.exp(3))) / 2))
    expected = torch.tensor([-0.5 / (1 + math.exp(1)), -0.5 / (1 + math.exp(-3))])
    torch.testing.assert_close(gradients, (expected, -expected))


def test_bradley_terry_loss_of_equal_scores_is_ln_2() -> None:
    """-ln sigmoid(0) = ln 2, and so is the mean over several such pairs."""
    scores = torch.tensor([3.0, -1.0, 0.0])
    torch.testing.assert_close(bradley_terry_loss(scores, scores, torch.zeros(3)), torch.tensor(math.log(2)))


def test_bradley_terry_loss_is_finite_for_large_differences() -> None:
    """A difference of -1000 has a loss of 1000 nats and a gradient of -1. The log of sigmoid(-1000) = 0 is infinite."""
    chosen = torch.tensor([0.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.tensor([1000.0]), torch.zeros(1))
    torch.testing.assert_close(loss, torch.tensor(1000.0))
    torch.testing.assert_close(torch.autograd.grad(loss, chosen)[0], torch.tensor([-1.0]))


def test_regression_loss_by_hand() -> None:
    """Errors 1 and -2: loss = (1 + 4) / 2 = 2.5, gradient = 2 x error / 2 = 1 and -2."""
    scores = torch.tensor([1.5, 0.0], requires_grad=True)
    loss = regression_loss(scores, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(loss, torch.tensor(2.5))
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], torch.tensor([1.0, -2.0]))


def test_label_smoothing_by_hand() -> None:
    """Two pairs with z = 2 and z = 0 - 2 - 1 = -3, smoothing 0.1: the cross-entropy with targets 0.9 and 0.1.

    -0.9 ln sigmoid(z) - 0.1 ln sigmoid(-z), with -ln sigmoid(z) = ln(1 + e^-z):
     z =  2: 0.9 ln(1 + e^-2) + 0.1 ln(1 + e^2)     z = -3: 0.9 ln(1 + e^3) + 0.1 ln(1 + e^-3)
    d loss / d chosen = (sigmoid(z) - 0.9) / 2; d loss / d rejected: the negative
    """
    chosen = torch.tensor([2.0, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, 2.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected, torch.tensor([0.0, 1.0]), label_smoothing=0.1)
    losses = [0.9 * math.log1p(math.exp(-z)) + 0.1 * math.log1p(math.exp(z)) for z in (2, -3)]
    torch.testing.assert_close(loss, torch.tensor(sum(losses) / 2))
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    expected = torch.tensor([(1 / (1 + math.exp(-z)) - 0.9) / 2 for z in (2, -3)])
    torch.testing.assert_close(gradients, (expected, -expected))


def test_label_smoothing_penalizes_large_differences() -> None:
    """Smoothing 0.1: the gradient is 0 at odds of 0.9 to 0.1, z = ln 9. A difference of 1000 has a loss of 100 nats."""
    chosen = torch.tensor([math.log(9), 1000.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2), torch.zeros(2), label_smoothing=0.1)
    gradient = torch.autograd.grad(loss, chosen)[0]
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.05]))
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    torch.testing.assert_close(loss, torch.tensor((entropy + 100) / 2))


def test_each_head_has_its_own_loss() -> None:
    """With two pairs and two heads, the loss is the mean over the heads. A margin applies to both heads."""
    chosen, rejected = torch.tensor([[1.0, 0.0], [0.5, 4.0]]), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    margin = torch.tensor([[0.0], [1.0]])
    z_values = [1 - 0 - 0, 0 - 2 - 0, 0.5 - 1 - 1, 4 - 1 - 1]
    loss = bradley_terry_loss(chosen, rejected, margin)
    torch.testing.assert_close(loss, torch.tensor(sum(math.log1p(math.exp(-z)) for z in z_values) / 4))


def test_centering_penalty_by_hand() -> None:
    """Sums 3 - 1 = 2 and 1 + 2 = 3: penalty (4 + 9) / 2 = 6.5, gradient 2 x sum / 2 = 2 and 3 for both responses.

    Scores of 3 and -3 are centered and have no penalty, whatever their difference.
    """
    chosen = torch.tensor([3.0, 1.0], requires_grad=True)
    rejected = torch.tensor([-1.0, 2.0], requires_grad=True)
    penalty = centering_penalty(chosen, rejected)
    torch.testing.assert_close(penalty, torch.tensor(6.5))
    gradients = torch.autograd.grad(penalty, (chosen, rejected))
    torch.testing.assert_close(gradients, (torch.tensor([2.0, 3.0]), torch.tensor([2.0, 3.0])))
    torch.testing.assert_close(centering_penalty(torch.tensor([3.0]), torch.tensor([-3.0])), torch.tensor(0.0))


def test_ensemble_std_by_hand() -> None:
    """Two heads and three responses. The offset of a head does not matter.

    head 1: 1, 2, 6   minus its mean 3: -2, -1,  3
    head 2: 9, 5, 10  minus its mean 8:  1, -3,  2
    The standard deviation of two numbers is half their difference: 1.5, 1, 0.5. The mean is 1.
    """
    scores = torch.tensor([[1.0, 9.0], [2.0, 5.0], [6.0, 10.0]])
    torch.testing.assert_close(ensemble_std(scores), torch.tensor(1.0))
    torch.testing.assert_close(ensemble_std(scores + torch.tensor([100.0, 0.0])), torch.tensor(1.0))
    torch.testing.assert_close(ensemble_std(scores[:, :1]), torch.tensor(0.0))
