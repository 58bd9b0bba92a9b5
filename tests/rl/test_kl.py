"""The price of leaving the reference: estimators by hand, and a controller that steers."""

import math

import pytest
import torch

from rlhf.errors import UserError
from rlhf.models import Policy, kl_divergence
from rlhf.rl import KLController
from rlhf.rl.objective import kl_k1, kl_k2, kl_k3


def test_estimators_by_hand() -> None:
    """log pi - log ref = ln 2 and -ln 2.

    k1: ln 2, -ln 2;  k2: (ln 2)^2 / 2 both;  k3 with r = ref / pi = 1/2 and 2: r - 1 - ln r = -1/2 + ln 2, 1 - ln 2
    """
    two = math.log(2)
    logprobs, reference = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0 - two, -1.0 + two]])
    torch.testing.assert_close(kl_k1(logprobs, reference), torch.tensor([[two, -two]]))
    torch.testing.assert_close(kl_k2(logprobs, reference), torch.tensor([[two * two / 2] * 2]))
    torch.testing.assert_close(kl_k3(logprobs, reference), torch.tensor([[two - 0.5, 1 - two]]))


def test_k1_and_k3_average_to_the_divergence_and_full_is_it() -> None:
    """Over all tokens of two distributions, weighted by pi: k1 and k3 sum to KL(pi || ref) = sum pi ln(pi / ref)."""
    pi, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    expected = 0.7 * math.log(0.7 / 0.3) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.4)
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close((pi * estimator(pi.log(), reference.log())).sum(), torch.tensor(expected))


def test_the_gradient_of_k2_is_that_of_the_divergence() -> None:
    """d KL / d logits of pi = pi (ln(pi / ref) - KL); E[grad k2] equals it, E[grad k1] is 0."""
    logits = torch.tensor([0.5, -0.3, 1.0], requires_grad=True)
    reference = torch.tensor([0.3, 0.3, 0.4]).log()
    logprobs = logits.log_softmax(dim=0)
    pi = logprobs.detach().exp()
    kl = (pi * (logprobs.detach() - reference)).sum()
    expected = pi * (logprobs.detach() - reference - kl)
    for estimator, wanted in ((kl_k2, expected), (kl_k1, torch.zeros(3))):
        (gradient,) = torch.autograd.grad((pi * estimator(logprobs, reference)).sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, wanted)


def test_full_divergence_is_that_of_the_logits(lm, tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Against softmaxes of the bare models' logits at temperature 0.7; 0 outside the chosen tokens."""
    torch.manual_seed(3)
    other = type(lm)(lm.config).eval()
    tokens = torch.randint(3, 300, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    chosen = mask.clone()
    chosen[:, :3] = False
    policy, reference = Policy(lm), Policy(other)
    with torch.no_grad():
        hidden = [model(tokens, mask, chosen).hidden for model in (policy, reference)]
        got = kl_divergence(policy, hidden[0], reference, hidden[1], chosen, 0.7)
        ours, theirs = ((model(tokens).logits[:, 2:-1] / 0.7).softmax(-1) for model in (lm, other))
    torch.testing.assert_close(got[:, 3:], (ours * (ours / theirs).log()).sum(-1), rtol=1e-4, atol=1e-6)
    assert got[:, :3].eq(0).all()


def test_the_price_follows_its_target() -> None:
    """Target 6, horizon 100, 10 answers an iteration; the error is clipped to 0.2 (Ziegler et al. 2019).

    KL 12: error clip(1) = 0.2: 0.1 x 1.02;  KL 6.3: error 0.05: x 1.005;  KL 3: error clip(-0.5): x 0.98
    """
    kl = KLController(target_per_sequence=6.0, horizon=100)
    kl.start(0.1)
    expected = 0.1
    for measured, factor in ((12.0, 1.02), (6.3, 1.005), (3.0, 0.98)):
        kl.steer(torch.tensor(measured), 10)
        expected *= factor
        assert float(kl.coef) == pytest.approx(expected, rel=1e-6)  # the KL is float32


def test_without_a_target_the_price_stays() -> None:
    kl = KLController()
    kl.start(0.1)
    kl.steer(torch.tensor(100.0), 64)
    assert float(kl.coef) == 0.1


def test_the_price_survives_a_checkpoint() -> None:
    old, new = KLController(target_per_sequence=1.0), KLController(target_per_sequence=1.0)
    old.start(0.1)
    new.start(0.5)
    old.steer(torch.tensor(9.0), 64)
    new.load_state_dict(old.state_dict())
    assert float(new.coef) == float(old.coef) != 0.1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"place": "loss"}, r"stage\.kl\.apply_to=loss with stage\.kl\.estimator=k1"),
        ({"place": "both"}, r"stage\.kl\.apply_to=both"),
        ({"estimator": "k4"}, r"stage\.kl\.estimator=k4"),
        ({"target_per_sequence": 0.0}, r"stage\.kl\.target_per_sequence=0"),
        ({"horizon": 0, "target_per_sequence": 6.0}, r"stage\.kl\.horizon=0"),
        ({"horizon": 100}, r"stage\.kl\.horizon=100 .* there is none"),
    ],
)
def test_what_cannot_hold_is_refused(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        KLController(**keys)


def test_prices_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"stage\.kl_coef=-1"):
        KLController().start(-1)
    with pytest.raises(UserError, match="0 stays 0"):
        KLController(target_per_sequence=6).start(0.0)
