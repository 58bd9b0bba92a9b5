"""The preference loss, by hand."""

import math

import torch

from rlhf.dpo.objective import sigmoid_loss


def test_sigmoid_loss_by_hand() -> None:
    """beta 0.5, two pairs.

    chosen - reference  rejected - reference  margin = 0.5 x difference
      -10 + 12 = 2         -9 + 5 = -4          3
       -4 +  3 = -1        -7 + 8 =  1         -1
    loss = (ln(1 + e^-3) + ln(1 + e^1)) / 2
    d loss / d chosen = -beta sigmoid(-margin) / 2 = -0.25 / (1 + e^margin); rejected: the opposite
    """
    chosen = torch.tensor([-10.0, -4.0], requires_grad=True)
    rejected = torch.tensor([-9.0, -7.0], requires_grad=True)
    loss = sigmoid_loss(chosen, rejected, torch.tensor([-12.0, -3.0]), torch.tensor([-5.0, -8.0]), beta=0.5)
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    torch.testing.assert_close(loss, torch.tensor((math.log1p(math.exp(-3)) + math.log1p(math.exp(1))) / 2))
    expected = torch.tensor([-0.25 / (1 + math.exp(3)), -0.25 / (1 + math.exp(-1))])
    torch.testing.assert_close(gradients, (expected, -expected))


def test_sigmoid_loss_is_ln_2_while_the_policy_is_the_reference() -> None:
    """-ln sigmoid(beta x 0) = ln 2 for any beta."""
    chosen, rejected = torch.tensor([-20.0, -3.0]), torch.tensor([-1.0, -7.0])
    loss = sigmoid_loss(chosen, rejected, chosen, rejected, beta=0.3)
    torch.testing.assert_close(loss, torch.tensor(math.log(2)))
