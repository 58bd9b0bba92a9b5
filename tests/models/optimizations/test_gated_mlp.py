"""Gated MLPs that store less for the backward pass compute the same outputs and gradients."""

import copy
import gc
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from models.pairs import GPT2, LLAMA, SIZES, assert_same, loss_and_gradients, model, saved_numbers
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import GemmaConfig, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhf.models import Policy
from rlhf.models.optimizations.fused_modules import fuse_modules
from rlhf.models.optimizations.gated_mlp import FusedGatedMLP
from rlhf.speed import speed

GATED = {
    "llama": LLAMA,
    "mistral": MistralConfig(**SIZES, num_key_value_heads=1),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
}
NOT_FUSED = {
    "no gate": GPT2,
    "another activation": GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8),
    "a bias": LlamaConfig(**SIZES, mlp_bias=True),
}


def is_fused(lm: PreTrainedModel) -> bool:
    return any(isinstance(part, FusedGatedMLP) for part in lm.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GATED)
def test_gated_mlps_change_nothing_and_store_half(name: str, dtype: torch.dtype) -> None:
    """Two layers store two numbers less for each token and each of 32 units, in float32 and in bf16-mixed."""
    lm = model(GATED[name])
    policy = Policy(lm)
    assert is_fused(lm)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        with speed(fused_mlp=False):
            expected, stored = loss_and_gradients(policy, shared=False), saved_numbers(lm)
        assert_same(loss_and_gradients(policy, shared=False), expected)
        assert saved_numbers(lm) == stored - 2 * 2 * 10 * 32


@pytest.mark.parametrize("name", NOT_FUSED)
def test_other_mlps_stay_as_they_are(name: str) -> None:
    lm = model(NOT_FUSED[name])
    fuse_modules(lm.base_model, FusedGatedMLP)
    assert not is_fused(lm)


def test_a_subclass_that_computes_something_else_stays_as_it_is() -> None:
    lm = model(LLAMA)
    for layer in lm.base_model.layers:
        layer.mlp.__class__ = type("Scaled", (type(layer.mlp),), {"forward": lambda mlp, hidden: 2 * hidden})
    fuse_modules(lm.base_model, FusedGatedMLP)
    assert not is_fused(lm)


class LimitedMLP(LlamaMLP):
    """An MLP with a limit of its activations, as those of DeepSeek V4 and of some layers of Step 3.7 have."""

    limit: float

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x).clamp(-self.limit, self.limit)
        output: Tensor = self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=self.limit)) * up)
        return output


def test_mlps_with_a_limit_stay_as_they_are() -> None:
    """Layers of one class may have different limits."""
    lm: Any = model(LLAMA)
    first, second = (layer.mlp for layer in lm.model.layers)
    for mlp, limit in ((first, math.inf), (second, 10.0)):
        mlp.__class__, mlp.limit = LimitedMLP, limit
    fuse_modules(lm.base_model, FusedGatedMLP)
    assert isinstance(first, FusedGatedMLP)
    assert not isinstance(second, FusedGatedMLP)


@pytest.mark.parametrize("target", ["down_proj", "gate_proj"])
def test_adapters_apply(target: str) -> None:
    """An adapter of ``down_proj`` is a module, and a frozen ``down_proj`` has no gradient."""
    lm = model(LLAMA)
    policy = Policy(lm)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[target], init_lora_weights=False), lm)
    with speed(fused_mlp=False):
        expected = loss_and_gradients(policy, shared=False)
    assert len(expected[1]) == 4
    assert_same(loss_and_gradients(policy, shared=False), expected)


def test_copies_and_classes() -> None:
    """A copy has its own weights, a model is fused once, and nothing keeps it alive."""
    lm: Any = model(LLAMA)
    Policy(lm)
    kinds = [type(layer.mlp) for layer in lm.model.layers]
    fuse_modules(lm.base_model, FusedGatedMLP)
    assert [type(layer.mlp) for layer in lm.model.layers] == kinds
    hidden = torch.ones(1, 1, 16)
    expected = lm.model.layers[0].mlp(hidden)
    for other in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        assert [type(layer.mlp) for layer in other.model.layers] == kinds
        assert torch.equal(other.model.layers[0].mlp(hidden), expected)
        with torch.no_grad():
            other.model.layers[0].mlp.down_proj.weight.zero_()
        assert not other.model.layers[0].mlp(hidden).any()
        assert torch.equal(lm.model.layers[0].mlp(hidden), expected)
    mlp = weakref.ref(lm.model.layers[0].mlp)
    gc.disable()
    try:
        del lm
        assert mlp() is None
    finally:
        gc.enable()
