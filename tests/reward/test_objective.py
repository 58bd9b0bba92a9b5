"""The losses of reward models, by hand."""

import math

import torch

from rlhf.reward.objective import bradley_terry_loss, centering_penalty, ensemble_std, regression_loss


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


def test_label_smoothing_by_hand() -> None:
    """Two pairs with leads z = 2 and -3 (one of it margin), smoothing 0.1: the cross-entropy with 0.9 and 0.1.

    -0.9 ln sigmoid(z) - 0.1 ln sigmoid(-z), with -ln sigmoid(z) = ln(1 + e^-z):
     z =  2: 0.9 ln(1 + e^-2) + 0.1 ln(1 + e^2)     z = -3: 0.9 ln(1 + e^3) + 0.1 ln(1 + e^-3)
    d / dz = sigmoid(z) - 0.9; halved by the mean; rejected: the opposite
    """
    chosen = torch.tensor([2.0, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, 2.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected, torch.tensor([0.0, 1.0]), label_smoothing=0.1)
    costs = [0.9 * math.log1p(math.exp(-z)) + 0.1 * math.log1p(math.exp(z)) for z in (2, -3)]
    torch.testing.assert_close(loss, torch.tensor(sum(costs) / 2))
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    expected = torch.tensor([(1 / (1 + math.exp(-z)) - 0.9) / 2 for z in (2, -3)])
    torch.testing.assert_close(gradients, (expected, -expected))


def test_with_smoothing_certainty_has_a_best_size() -> None:
    """Smoothing 0.1: no gradient at odds of 0.9 to 0.1, z = ln 9, and a lead of 1000 costs 100 nats, not 0."""
    chosen = torch.tensor([math.log(9), 1000.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2), torch.zeros(2), label_smoothing=0.1)
    gradient = torch.autograd.grad(loss, chosen)[0]
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.05]))
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    torch.testing.assert_close(loss, torch.tensor((entropy + 100) / 2))


def test_each_head_has_its_own_loss() -> None:
    """Two pairs by two heads are the mean of the two heads' losses; a pair's margin holds for both heads."""
    chosen, rejected = torch.tensor([[1.0, 0.0], [0.5, 4.0]]), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    margin = torch.tensor([[0.0], [1.0]])
    leads = [1 - 0 - 0, 0 - 2 - 0, 0.5 - 1 - 1, 4 - 1 - 1]
    loss = bradley_terry_loss(chosen, rejected, margin)
    torch.testing.assert_close(loss, torch.tensor(sum(math.log1p(math.exp(-z)) for z in leads) / 4))


def test_centering_penalty_by_hand() -> None:
    """Sums 3 - 1 = 2 and 1 + 2 = 3: (4 + 9) / 2 = 6.5; gradient 2 x sum / 2 = 2 and 3 for either answer.

    Scores 3 and -3 are centred: no cost, however far apart.
    """
    chosen = torch.tensor([3.0, 1.0], requires_grad=True)
    rejected = torch.tensor([-1.0, 2.0], requires_grad=True)
    penalty = centering_penalty(chosen, rejected)
    torch.testing.assert_close(penalty, torch.tensor(6.5))
    gradients = torch.autograd.grad(penalty, (chosen, rejected))
    torch.testing.assert_close(gradients, (torch.tensor([2.0, 3.0]), torch.tensor([2.0, 3.0])))
    torch.testing.assert_close(centering_penalty(torch.tensor([3.0]), torch.tensor([-3.0])), torch.tensor(0.0))


def test_head_spread_by_hand() -> None:
    """Two heads, three answers; the zero of a head does not count.

    head 1: 1, 2, 6   less its mean 3: -2, -1,  3
    head 2: 9, 5, 10  less its mean 8:  1, -3,  2
    half the distance is the deviation of two: 1.5, 1, 0.5; mean 1
    """
    scores = torch.tensor([[1.0, 9.0], [2.0, 5.0], [6.0, 10.0]])
    torch.testing.assert_close(ensemble_std(scores), torch.tensor(1.0))
    torch.testing.assert_close(ensemble_std(scores + torch.tensor([100.0, 0.0])), torch.tensor(1.0))
    torch.testing.assert_close(ensemble_std(scores[:, :1]), torch.tensor(0.0))
