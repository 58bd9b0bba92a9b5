"""KL estimators by hand, and the KL controller."""

import math

import pytest
import torch
from transformers import PreTrainedModel

from rlhf.errors import ConfigError
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


def test_k1_and_k3_are_unbiased() -> None:
    """Summed over the vocabulary with weights pi, k1 and k3 give KL(pi || ref) = sum pi ln(pi / ref)."""
    pi, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    expected = 0.7 * math.log(0.7 / 0.3) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.4)
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close((pi * estimator(pi.log(), reference.log())).sum(), torch.tensor(expected))


def test_gradients_of_k1_and_k2_in_expectation() -> None:
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


def test_full_kl_matches_the_softmax_of_the_logits(lm: PreTrainedModel) -> None:
    """Compared with the plain models' logits at temperature 0.7; masked tokens are 0."""
    torch.manual_seed(3)
    other = type(lm)(lm.config).eval()
    tokens = torch.randint(3, 300, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    response_mask = mask.clone()
    response_mask[:, :3] = False
    policy, reference = Policy(lm), Policy(other)
    with torch.no_grad():
        hidden = [model(tokens, mask, response_mask).states for model in (policy, reference)]
        kl = kl_divergence(policy, hidden[0], reference, hidden[1], response_mask, 0.7)
        ours, theirs = ((model(tokens).logits[:, 2:-1] / 0.7).softmax(-1) for model in (lm, other))
    torch.testing.assert_close(kl[:, 3:], (ours * (ours / theirs).log()).sum(-1), rtol=1e-4, atol=1e-6)
    assert kl[:, :3].eq(0).all()


def test_the_coefficient_follows_the_target() -> None:
    """Target 6, horizon 100, 10 responses per iteration; the error is clipped to 0.2 (Ziegler et al. 2019).

    KL 12: error clip(1) = 0.2, factor 1.02;  KL 6.3: error 0.05, factor 1.005;  KL 3: error clip(-0.5), factor 0.98
    """
    kl = KLController(target_per_sequence=6.0, horizon=100)
    kl.initialize(0.1)
    expected = 0.1
    for measured, factor in ((12.0, 1.02), (6.3, 1.005), (3.0, 0.98)):
        kl.update(torch.tensor(measured), 10)
        expected *= factor
        assert float(kl.coef) == pytest.approx(expected, rel=1e-6)  # the KL is float32


@pytest.mark.parametrize(("apply_to", "used"), [("reward", 0.1), ("loss", 0.102)])
def test_an_update_returns_the_coefficient_that_the_iteration_uses(apply_to: str, used: float) -> None:
    """Rewards are computed before the update, and the loss after it."""
    kl = KLController(
        apply_to=apply_to, estimator="k3" if apply_to == "loss" else "k1", target_per_sequence=6.0, horizon=100
    )
    kl.initialize(0.1)
    assert kl.update(12.0, 10) == pytest.approx(used)


def test_the_coefficient_stays_positive_if_an_iteration_is_longer_than_the_horizon() -> None:
    """64 responses, horizon 10, KL 0: a step of -0.2 instead of -0.2 * 6.4, so 0.1 becomes 0.08."""
    kl = KLController(target_per_sequence=6.0, horizon=10)
    kl.initialize(0.1)
    kl.update(0.0, 64)
    assert kl.coef == pytest.approx(0.08, rel=1e-6)


@pytest.mark.parametrize("measured", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_leaves_the_coefficient_unchanged(measured: float) -> None:
    kl = KLController(target_per_sequence=6.0, horizon=100)
    kl.initialize(0.1)
    kl.update(measured, 10)
    assert kl.coef == 0.1


def test_the_coefficient_is_fixed_without_a_target() -> None:
    kl = KLController()
    kl.initialize(0.1)
    kl.update(torch.tensor(100.0), 64)
    assert float(kl.coef) == 0.1


def test_the_coefficient_is_stored_in_checkpoints() -> None:
    old, new = KLController(target_per_sequence=1.0), KLController(target_per_sequence=1.0)
    old.initialize(0.1)
    new.initialize(0.5)
    old.update(torch.tensor(9.0), 64)
    new.load_state_dict(old.state_dict())
    assert float(new.coef) == float(old.coef) != 0.1


def test_a_fixed_coefficient_is_that_of_the_resumed_run() -> None:
    """The checkpoint has 0.1; the resumed run is configured with 0.5."""
    old, new = KLController(), KLController()
    old.initialize(0.1)
    new.initialize(0.5)
    new.load_state_dict(old.state_dict())
    assert new.coef == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_coefficient_adapts_in_every_precision(dtype: torch.dtype) -> None:
    """400 iterations of 64 responses with a KL above the target: 0.1 (1 + 0.2 x 64 / 10000)^400 = 0.1668."""
    kl = KLController(target_per_sequence=1.0)
    kl.initialize(0.1)
    kl.to(dtype)
    for _ in range(400):
        kl.update(9.0, 64)
    assert kl.coef == pytest.approx(0.1 * 1.00128**400, rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"apply_to": "loss"}, r"stage\.kl\.apply_to=loss cannot be used with stage\.kl\.estimator=k1"),
        ({"apply_to": "both"}, r"stage\.kl\.apply_to must be reward or loss, got 'both'"),
        ({"estimator": "k4"}, r"stage\.kl\.estimator must be k1, k2, k3, or full, got 'k4'"),
        ({"target_per_sequence": 0.0}, r"stage\.kl\.target_per_sequence must be a number above 0 or null, got 0"),
        (
            {"horizon": 0, "target_per_sequence": 6.0},
            r"stage\.kl\.horizon must be an integer of at least 1 or null, got 0",
        ),
        ({"horizon": 100}, r"stage\.kl\.horizon=100 has no effect without stage\.kl\.target_per_sequence"),
    ],
)
def test_invalid_settings_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KLController(**keys)


def test_a_penalty_requires_the_kl() -> None:
    with pytest.raises(ConfigError, match=r"stage\.kl\.monitor=false requires stage\.kl_coef=0, got 0\.1"):
        KLController(monitor=False).initialize(0.1)


def test_an_adaptive_coefficient_of_0_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stage\.kl_coef must be above 0 with stage\.kl\.target_per_sequence, got 0"):
        KLController(target_per_sequence=6).initialize(0.0)
