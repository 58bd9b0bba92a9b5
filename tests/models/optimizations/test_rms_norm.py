"""RMS norms that store less for the backward pass compute the same outputs and gradients."""

import pickle
from typing import Any

import pytest
import torch
from models.pairs import GPT2, LLAMA, SIZES, assert_same, loss_and_gradients, model, saved_numbers
from torch import Tensor
from transformers import GemmaConfig, Mamba2Config, MistralConfig, Qwen2Config, Qwen3Config

from rlhf.models import Policy
from rlhf.models.optimizations.fused_modules import fuse_modules
from rlhf.models.optimizations.rms_norm import FusedRMSNorm, _RMSNorm
from rlhf.speed import speed

MAMBA = Mamba2Config(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, state_size=8, n_groups=1
)
# Numbers that norms of float32 states store less for each token: two norms per layer and one at the end. In float32,
# Qwen3 adds those of queries and keys: two heads and one head of width 8 in each layer.
FEWER = {
    "llama": (LLAMA, 5 * 16),
    "mistral": (MistralConfig(**SIZES, num_key_value_heads=1), 5 * 16),
    "qwen2": (Qwen2Config(**SIZES, num_key_value_heads=2), 5 * 16),
    "qwen3": (Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8), 5 * 16),
    "mamba2": (MAMBA, 3 * 16),
}


@pytest.fixture(autouse=True)
def narrow_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.models.optimizations.rms_norm.MIN_WIDTH", 1)


def test_narrow_norms_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model(LLAMA)
    monkeypatch.setattr("rlhf.models.optimizations.rms_norm.MIN_WIDTH", 17)
    fuse_modules(lm.base_model, FusedRMSNorm)
    assert not isinstance(lm.model.norm, FusedRMSNorm)
    monkeypatch.setattr("rlhf.models.optimizations.rms_norm.MIN_WIDTH", 16)
    fuse_modules(lm.base_model, FusedRMSNorm)
    assert isinstance(lm.model.norm, FusedRMSNorm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FEWER)
def test_norms_change_nothing_and_store_less(name: str, dtype: torch.dtype) -> None:
    config, fewer = FEWER[name]
    lm = model(config)
    policy = Policy(lm)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        with speed(fused_rms_norm=False):
            expected, stored = loss_and_gradients(policy, shared=False), saved_numbers(lm)
        rounding = 1e-4 if dtype is torch.float32 else 2**-7  # bfloat16 has 8 bits
        assert_same(loss_and_gradients(policy, shared=False), expected, rtol=rounding)
        queries_and_keys = 2 * 3 * 8 if name == "qwen3" and dtype is torch.float32 else 0
        assert saved_numbers(lm) <= stored - 10 * (fewer + queries_and_keys)


def test_gradients_in_float64() -> None:
    """The gradients agree with finite differences, also of states that are not large compared with eps."""
    torch.manual_seed(0)
    weight = torch.randn(6, dtype=torch.double)
    hidden = torch.randn(3, 2, 6, dtype=torch.double) * torch.tensor([1e-2, 1.0, 30.0])[:, None, None]

    def compute(hidden: Tensor, weight: Tensor) -> Any:
        return _RMSNorm.apply(hidden, weight, 1e-2)  # type: ignore[no-untyped-call]

    assert torch.autograd.gradcheck(compute, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("config", [GPT2, GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8)])
def test_other_norms_stay_as_they_are(config: Any) -> None:
    """GPT-2 has layer norms, and Gemma adds 1 to the weight."""
    lm = model(config)
    fuse_modules(lm.base_model, FusedRMSNorm)
    assert not any(isinstance(part, FusedRMSNorm) for part in lm.modules())


def test_frozen_weights_and_other_precisions() -> None:
    """A frozen weight has no gradient. States in bfloat16 are computed by the norm of transformers."""
    norm: Any = pickle.loads(pickle.dumps(Policy(model(LLAMA)).lm.model.norm))
    hidden = torch.randn(1, 3, 16, requires_grad=True)
    norm.weight.requires_grad_(False)
    norm(hidden).sum().backward()
    assert norm.weight.grad is None
    assert hidden.grad is not None
    norm.bfloat16()
    assert norm(hidden.bfloat16()).dtype == torch.bfloat16
    assert not norm.can_fuse_now(hidden.bfloat16())
