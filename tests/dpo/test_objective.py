"""Values and gradients of the preference losses, by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rlhf.dpo.objective import (
    conservative_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    needs,
    odds_ratio_loss,
    response_lengths,
    response_nll,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)


def log_ratios(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


def check_loss(loss: Tensor, value: float, gradients: dict[Tensor, list[float]]) -> None:
    """Assert that a loss has this value and these gradients."""
    torch.testing.assert_close(loss.detach(), torch.tensor(value))
    found = torch.autograd.grad(loss, list(gradients))
    torch.testing.assert_close(found, tuple(torch.tensor(expected) for expected in gradients.values()))


def test_sigmoid_loss_by_hand() -> None:
    """beta 0.5, two pairs of log pi - log reference.

    chosen  rejected  margin = 0.5 x difference
       2      -4         3
      -1       1        -1
    loss = (ln(1 + e^-3) + ln(1 + e^1)) / 2
    d loss / d chosen = -beta sigmoid(-margin) / 2 = -0.25 / (1 + e^margin); d loss / d rejected has the opposite sign
    """
    chosen, rejected = log_ratios(2, -1), log_ratios(-4, 1)
    slopes = [-0.25 / (1 + math.exp(3)), -0.25 / (1 + math.exp(-1))]
    check_loss(
        sigmoid_loss(chosen, rejected, beta=0.5),
        (math.log1p(math.exp(-3)) + math.log1p(math.exp(1))) / 2,
        {chosen: slopes, rejected: [-slope for slope in slopes]},
    )


def test_ipo_loss_by_hand() -> None:
    """beta 0.25: the target difference is 1 / (2 x 0.25) = 2 nats.

    chosen  rejected  difference - 2  squared
       2      -4            4            16      beyond the target: the gradient changes sign
      -1       1           -4            16
       1       0           -1             1
    loss = 33 / 3 = 11; d loss / d chosen = 2 x (difference - 2) / 3
    """
    chosen, rejected = log_ratios(2, -1, 1), log_ratios(-4, 1, 0)
    slopes = [8 / 3, -8 / 3, -2 / 3]
    check_loss(ipo_loss(chosen, rejected, beta=0.25), 11.0, {chosen: slopes, rejected: [-slope for slope in slopes]})


def test_hinge_loss_by_hand() -> None:
    """beta 0.5: a difference of 2 nats is enough.

    chosen  rejected  1 - 0.5 x difference  loss
       2      -4             -2               0    no gradient
      -1       1              2               2    gradient -0.5 / 2 pairs
    """
    chosen, rejected = log_ratios(2, -1), log_ratios(-4, 1)
    check_loss(hinge_loss(chosen, rejected, beta=0.5), 1.0, {chosen: [0.0, -0.25], rejected: [0.0, 0.25]})


def test_conservative_loss_by_hand() -> None:
    """beta 0.5, label_smoothing 0.2, margin 0.5 x (2 - -4) = 3.

    loss = 0.8 ln(1 + e^-3) + 0.2 ln(1 + e^3)
    d loss / d margin = -0.8 (1 - s) + 0.2 s = s - 0.8 with s = sigmoid(3), which is positive because the margin is
    larger than the optimum ln(0.8 / 0.2)
    """
    chosen, rejected = log_ratios(2), log_ratios(-4)
    slope = 0.5 * (1 / (1 + math.exp(-3)) - 0.8)
    assert slope > 0
    check_loss(
        conservative_loss(chosen, rejected, beta=0.5, label_smoothing=0.2),
        0.8 * math.log1p(math.exp(-3)) + 0.2 * math.log1p(math.exp(3)),
        {chosen: [slope], rejected: [-slope]},
    )


def test_conservative_loss_is_minimal_at_the_log_odds_of_the_labels() -> None:
    """With 4 of 5 labels correct, the gradient is 0 at a margin of ln 4."""
    chosen = log_ratios(math.log(4))
    loss = conservative_loss(chosen, torch.zeros(1), beta=1.0, label_smoothing=0.2)
    torch.testing.assert_close(torch.autograd.grad(loss, chosen)[0], torch.zeros(1))


def test_robust_loss_by_hand() -> None:
    """beta 0.5, label_smoothing 0.2, margin 0.5 x (2 - -4) = 3.

    loss = (0.8 ln(1 + e^-3) - 0.2 ln(1 + e^3)) / 0.6
    d loss / d margin = (-0.8 (1 - s) - 0.2 s) / 0.6 with s = sigmoid(3)
    """
    chosen, rejected = log_ratios(2), log_ratios(-4)
    s = 1 / (1 + math.exp(-3))
    slope = 0.5 * (-0.8 * (1 - s) - 0.2 * s) / 0.6
    check_loss(
        robust_loss(chosen, rejected, beta=0.5, label_smoothing=0.2),
        (0.8 * math.log1p(math.exp(-3)) - 0.2 * math.log1p(math.exp(3))) / 0.6,
        {chosen: [slope], rejected: [-slope]},
    )


def test_robust_loss_is_unbiased() -> None:
    """Over labels of which 1 in 5 is flipped, its mean is the DPO loss of the true labels, ln(1 + e^-3)."""
    chosen, rejected = torch.tensor([3.0]), torch.tensor([0.0])
    right = robust_loss(chosen, rejected, beta=1.0, label_smoothing=0.2)
    flipped = robust_loss(rejected, chosen, beta=1.0, label_smoothing=0.2)
    torch.testing.assert_close(0.8 * right + 0.2 * flipped, torch.tensor(math.log1p(math.exp(-3))))


@pytest.mark.parametrize("loss", [conservative_loss, robust_loss])
def test_losses_without_smoothing_equal_dpo(loss: Callable[..., Tensor]) -> None:
    """Margin 3: ln(1 + e^-3)."""
    found = loss(torch.tensor([2.0]), torch.tensor([-4.0]), beta=0.5, label_smoothing=0.0)
    torch.testing.assert_close(found, torch.tensor(math.log1p(math.exp(-3))))


def test_simpo_loss_by_hand() -> None:
    """beta 2, target margin 1.5, mean log-probs per token of -0.5 and -1.0.

    margin = 2 x 0.5 - 1.5 = -0.5; loss = ln(1 + e^0.5); d loss / d chosen = -2 sigmoid(0.5) = -2 / (1 + e^-0.5)
    """
    chosen, rejected = log_ratios(-0.5), log_ratios(-1.0)
    slope = -2 / (1 + math.exp(-0.5))
    check_loss(
        simpo_loss(chosen, rejected, beta=2.0, target_margin=1.5),
        math.log1p(math.exp(0.5)),
        {chosen: [slope], rejected: [-slope]},
    )


def test_odds_ratio_loss_by_hand() -> None:
    """beta 0.5; probabilities 1/2 and 1/5.

    odds 1 and 1/4, ratio 4: loss = 0.5 x -ln(4 / 5) = 0.5 ln 1.25
    d loss / d log odds ratio = -0.5 x 1/5 = -0.1; d log odds / d log p = 1 / (1 - p): 2 and 1.25
    """
    chosen, rejected = log_ratios(math.log(1 / 2)), log_ratios(math.log(1 / 5))
    check_loss(
        odds_ratio_loss(chosen, rejected, beta=0.5), 0.5 * math.log(1.25), {chosen: [-0.1 * 2], rejected: [0.1 * 1.25]}
    )


def test_odds_ratio_loss_of_certain_responses_is_finite() -> None:
    """Probability 1 has infinite odds. They are clamped at 10^6, beyond which there is no gradient."""
    chosen, rejected = log_ratios(0.0), log_ratios(-1e-8)
    check_loss(odds_ratio_loss(chosen, rejected, beta=1.0), math.log(2), {chosen: [0.0], rejected: [0.0]})


def test_kto_loss_by_hand() -> None:
    """beta 0.5, kl 1, weights 1 and 2, three responses.

    label        log ratio  gain     weight x sigmoid(-0.5 x gain)
    desirable        3      3 - 1      1 x 1 / (1 + e)
    undesirable      3      1 - 3      2 x 1 / (1 + 1/e)
    undesirable      1      1 - 1      2 x 1/2
    d / d log ratio of weight x sigmoid(-0.5 gain) = -+ 0.5 weight s (1 - s), s (1 - s) = e / (1 + e)^2; / 3 responses
    """
    ratios, kl = log_ratios(3, 3, 1), torch.tensor(1.0)
    e = math.e
    slope = 0.5 * e / (1 + e) ** 2 / 3
    loss = kto_loss(
        ratios, torch.tensor([True, False, False]), kl, beta=0.5, desirable_weight=1.0, undesirable_weight=2.0
    )
    check_loss(loss, (1 / (1 + e) + 2 / (1 + 1 / e) + 1) / 3, {ratios: [-slope, 2 * slope, 2 * 0.5 * 0.25 / 3]})


def test_kto_weights_do_not_depend_on_the_default_dtype() -> None:
    """Under bf16-true, training steps run with bfloat16 as the default dtype, in which 1.1 would be 1.1015625.

    A log-ratio at the baseline has the loss weight / 2.
    """
    torch.set_default_dtype(torch.bfloat16)
    try:
        ratios, labels = torch.zeros(2, dtype=torch.float32), torch.tensor([True, False])
        loss = kto_loss(ratios, labels, ratios.sum(), beta=0.5, desirable_weight=1.1, undesirable_weight=1.3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.item() == pytest.approx((1.1 + 1.3) / 2 / 2, rel=1e-6)


def test_response_nll_by_hand() -> None:
    """Responses of 2 and 6 tokens, -3 and -1 nats: 4 nats over 8 tokens. Each log-prob has the weight 1/8."""
    logprobs = log_ratios(-3, -1)
    check_loss(response_nll(logprobs, torch.tensor([2, 6])), 0.5, {logprobs: [-0.125, -0.125]})


def test_response_nll_of_no_responses_is_0() -> None:
    """A batch of undesirable responses has no SFT term, rather than NaN."""
    logprobs = log_ratios(-3, -1)
    none = torch.tensor([False, False])
    check_loss(response_nll(logprobs[none], torch.tensor([2, 6])[none]), 0.0, {logprobs: [0.0, 0.0]})


@pytest.mark.parametrize(
    ("loss", "first"),
    [
        (lambda x, y: sigmoid_loss(x, y, beta=0.3), math.log(2)),
        (lambda x, y: ipo_loss(x, y, beta=0.1), 1 / (4 * 0.1**2)),
        (lambda x, y: hinge_loss(x, y, beta=0.3), 1.0),
        (lambda x, y: conservative_loss(x, y, beta=0.3, label_smoothing=0.1), math.log(2)),
        (lambda x, y: robust_loss(x, y, beta=0.3, label_smoothing=0.1), math.log(2)),
        (lambda x, y: kto_loss(x, x < y, x.mean(), beta=0.3, desirable_weight=1.0, undesirable_weight=3.0), 1.5),
    ],
)
def test_losses_while_the_policy_equals_the_reference(loss: Callable[[Tensor, Tensor], Tensor], first: float) -> None:
    """Log-ratios of 0: -ln sigmoid(0) = ln 2, (0 - 1 / (2 beta))^2, 1 - 0, and for KTO half the weight, which is 3."""
    torch.testing.assert_close(loss(torch.zeros(4), torch.zeros(4)), torch.tensor(first))


def test_needs_marks_functions_and_classes() -> None:
    """The decorator returns the same object with the attribute ``needs``."""

    def loss(chosen: Tensor) -> Tensor:
        return chosen

    class LossModule(nn.Module):
        pass

    for marked in (loss, LossModule):
        assert needs(reference_free=True)(marked) is marked
        assert vars(marked)["needs"] == {"reference_free": True}
    both = {"reference_free": True, "length_normalized": True}
    assert vars(simpo_loss)["needs"] == vars(odds_ratio_loss)["needs"] == both


def test_response_lengths_are_at_least_1() -> None:
    """3, 1 and 0 True entries; the last counts as 1, so that a mean over it is finite."""
    mask = torch.tensor([[False, True, True, True], [False, False, True, False], [False] * 4])
    assert response_lengths(mask).tolist() == [3, 1, 1]
