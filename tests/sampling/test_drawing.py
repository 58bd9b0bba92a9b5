"""The distribution of drawn tokens and the filters of logits, by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.sampling import SamplingParams
from rlhf.sampling.drawing import INVALID_TOKEN, draw_tokens, filter_logits

PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])


def frequencies(params: SamplingParams, logits: Tensor, draws: int = 20_000) -> Tensor:
    """Relative frequency of each token among many draws."""
    torch.manual_seed(0)
    tokens = draw_tokens(logits.expand(draws, -1), params)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(temperature=1.0), PROBABILITIES),
        # p ** (1 / T): squares divided by their sum, 0.25 + 0.0625 + 0.0225 + 0.0036 + 0.0016 = 0.3402
        (SamplingParams(temperature=0.5), PROBABILITIES.square() / 0.3402),
        # the two most likely tokens, with 0.5 and 0.25 of 0.75
        (SamplingParams(temperature=1.0, top_k=2), torch.tensor([2 / 3, 1 / 3, 0, 0, 0])),
        # 0.5 + 0.25 < 0.8 <= 0.5 + 0.25 + 0.15: three tokens reach it
        (SamplingParams(temperature=1.0, top_p=0.8), torch.tensor([5 / 9, 2.5 / 9, 1.5 / 9, 0, 0])),
        (SamplingParams(temperature=0.0), torch.tensor([1.0, 0, 0, 0, 0])),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "greedy"],
)
def test_draws_follow_the_distribution(params: SamplingParams, expected: Tensor) -> None:
    """20,000 draws: each frequency is within four standard errors, sqrt(p (1 - p) / n); 0 is exactly 0."""
    found = frequencies(params, PROBABILITIES.log()[None])
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / 20_000).sqrt() + 1e-7).all()


def test_draws_from_a_large_vocabulary_pass_a_chi_square_test() -> None:
    """Random probabilities of 300 tokens, 100,000 draws: chi-square has mean 299 and standard deviation 24.5.

    The statistic is within four standard deviations of the mean: smaller values would be suspicious as well.
    """
    torch.manual_seed(1)
    logits = torch.randn(300)
    draws = draw_tokens(logits.expand(100_000, -1), SamplingParams(temperature=1.0))
    expected = logits.softmax(dim=0) * len(draws)
    found = torch.bincount(draws, minlength=300)
    assert abs(((found - expected).square() / expected).sum() - 299) < 4 * (2 * 299) ** 0.5


@pytest.mark.parametrize("random", [0, 1, 2**29, 2**30 - 1])
def test_a_token_that_the_filters_removed_is_never_drawn(monkeypatch: pytest.MonkeyPatch, random: int) -> None:
    """Not even with the smallest and the largest random number. The kept tokens are in different blocks of 128."""
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.full(size, random))
    logits = torch.full((1, 500), -1.0)
    logits[0, [3, 490]] = 1.0
    assert draw_tokens(logits, SamplingParams(temperature=1.0, top_k=2)).item() in (3, 490)


def test_a_draw_is_a_token_of_the_vocabulary_even_if_the_logits_overflow() -> None:
    """3e38 / 0.5 is infinite in float32. The last block of 128 tokens is not full: 300 = 2 x 128 + 44."""
    logits = torch.full((1, 300), 3e38)
    assert 0 <= draw_tokens(logits, SamplingParams(temperature=0.5)).item() < 300


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_whose_logits_are_not_finite_are_marked(temperature: float) -> None:
    """A NaN, an infinite logit, no finite logit; tokens of probability 0 are no fault."""
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, nan, 1.0], [0.0, inf, 1.0], [-inf, -inf, -inf], [-inf, 0.0, -inf]])
    tokens = draw_tokens(logits, SamplingParams(temperature=temperature))
    assert tokens.tolist() == [INVALID_TOKEN] * 3 + [1]


class Operations(TorchDispatchMode):
    """Records the names of all operators, and the dtypes of the tensors that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        self.floating_cumsum = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.names.add(name)
        self.floating_cumsum |= name == "cumsum" and args[0].is_floating_point()
        result = function(*args, **(kwargs or {}))
        self.dtypes |= {tensor.dtype for tensor in tree_leaves(result) if isinstance(tensor, Tensor)}
        return result


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.7}], ids=["plain", "top_k", "top_p"])
def test_draws_need_only_operators_that_every_device_has(filters: dict[str, Any]) -> None:
    """No float64, which Apple's devices lack, no cumulative sum of floats, which is not deterministic on CUDA, and
    nothing that makes the host wait for the device.
    """
    with Operations() as operations:
        draw_tokens(torch.randn(4, 50), SamplingParams(temperature=0.7, **filters))
    assert torch.float64 not in operations.dtypes
    assert not operations.floating_cumsum
    assert not operations.names & {"searchsorted", "multinomial", "nonzero", "_local_scalar_dense", "is_nonzero"}


def test_rows_are_drawn_independently() -> None:
    """Two rows with even odds: each of the four pairs has frequency 1/4 (four standard errors: 0.0123)."""
    torch.manual_seed(0)
    pairs = draw_tokens(torch.zeros(40_000, 2), SamplingParams(temperature=1.0)).reshape(-1, 2)  # neighboring rows
    counts = torch.bincount(2 * pairs[:, 0] + pairs[:, 1], minlength=4) / 20_000
    assert (counts - 0.25).abs().max() < 0.0123


def kept_tokens(logits: list[float], **filters: float) -> list[int]:
    """Tokens whose logits stay finite; kept logits must be unchanged."""
    result = filter_logits(torch.tensor([logits]), **filters)[0]
    assert all(value in (logits[i], -torch.inf) for i, value in enumerate(result.tolist()))
    return torch.isfinite(result).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(0, [0, 1, 2, 3]), (1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])],
)
def test_top_k_keeps_the_k_most_likely_tokens(top_k: int, expected: list[int]) -> None:
    """Logits 2, -1, 3, 0: the tokens in descending order are 2, 0, 3, 1."""
    assert kept_tokens([2.0, -1.0, 3.0, 0.0], top_k=top_k) == expected


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1.0, [0, 1, 2]), (0.95, [0, 1, 2]), (0.85, [0, 2]), (0.65, [0, 2]), (0.55, [2]), (0.01, [2]), (1e-13, [2])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_probability(top_p: float, expected: list[int]) -> None:
    """Probabilities 0.3, 0.1, 0.6: token 2 reaches 0.6, tokens 2 and 0 reach 0.9, all tokens reach 1."""
    assert kept_tokens([float(torch.tensor(p).log()) for p in (0.3, 0.1, 0.6)], top_p=top_p) == expected


def test_top_p_applies_after_top_k() -> None:
    """Probabilities 0.4, 0.35, 0.25. Of the top two, the first has 0.4 / 0.75 = 0.53 >= 0.5 and is kept alone."""
    logits = [float(torch.tensor(p).log()) for p in (0.4, 0.35, 0.25)]
    assert kept_tokens(logits, top_k=2, top_p=0.5) == [0]
    assert kept_tokens(logits, top_p=0.5) == [0, 1]
