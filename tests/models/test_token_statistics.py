"""The fused statistics equal the separate ones, and so do their gradients."""

import pytest
import torch
from torch import Tensor

from rlhf.models.token_statistics import EntropyMode, token_statistics
from rlhf.speed import speed


def logits_and_targets(dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits of 70 tokens, of which one has an offset, one a vanishing probability and some are the most likely."""
    torch.manual_seed(0)
    logits, targets = scale * torch.randn(70, 5001, dtype=dtype), torch.randint(5001, (70,))
    logits[3] += 1000
    logits[4, 0], targets[4] = -500, 0
    targets[10:20] = logits[10:20].argmax(dim=1)
    return logits, targets


def run(
    fused: bool, logits: Tensor, targets: Tensor, temperature: float, entropy: EntropyMode
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Statistics and the gradient of a loss that weighs each token differently."""
    source = logits.clone().requires_grad_()
    with speed(fused_logprobs=fused):
        results = token_statistics(source + 0, targets, temperature, entropy, True)
    weights = torch.linspace(-1, 1, len(targets), dtype=logits.dtype)
    loss = (results[0] * weights).sum()
    if entropy == "grad":
        loss = loss + (results[1] * weights.flip(0)).sum()
    loss.backward()
    return tuple(result.detach() for result in results), source.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", ["none", "value", "grad"])
def test_fused_statistics_are_exact(temperature: float, entropy: EntropyMode) -> None:
    """In float64, rounding is below 1e-10, so that a wrong formula cannot pass."""
    logits, targets = logits_and_targets(torch.float64)
    found, expected = (run(fused, logits, targets, temperature, entropy) for fused in (True, False))
    assert len(found[0]) == (2 if entropy == "none" else 3)
    for one, other in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert found[0][-1].sum() == 10


def test_fused_statistics_in_float32() -> None:
    logits, targets = logits_and_targets(torch.float32)
    found, expected = (run(fused, logits, targets, 1.0, "value") for fused in (True, False))
    others = torch.arange(70) != 3  # The row with the offset of 1000 has fewer digits left.
    torch.testing.assert_close(found[0][0], expected[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][1][others], expected[0][1][others], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)


def test_autocast_does_not_change_the_statistics() -> None:
    """It computes some reductions in bfloat16, which would round an entropy of 6 nats to 0.03 nats."""
    logits, targets = logits_and_targets(torch.float32)
    expected = run(True, logits, targets, 1.0, "grad")
    with torch.autocast("cpu", torch.bfloat16):
        found = run(True, logits, targets, 1.0, "grad")
    for one, other in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
        assert torch.equal(one, other)


def test_a_second_backward_pass_is_refused() -> None:
    """The first one has overwritten the probabilities."""
    logits, targets = torch.randn(3, 6, requires_grad=True), torch.tensor([1, 5, 0])
    (logprobs,) = token_statistics(logits + 0, targets, 1.0, "none", False)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


def test_nan_stays_where_it_is() -> None:
    logits, targets = torch.randn(3, 6), torch.tensor([1, 5, 0])
    logits[1, 2] = torch.nan
    logprobs, entropy, hits = token_statistics(logits, targets, 1.0, "value", True)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    assert not hits[1]


def test_no_tokens() -> None:
    logprobs, entropy = token_statistics(torch.empty(0, 6), torch.empty(0, dtype=torch.long), 1.0, "value", False)
    assert logprobs.shape == entropy.shape == (0,)
