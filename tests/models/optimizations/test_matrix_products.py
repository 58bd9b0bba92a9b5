"""Matrix products with oneDNN compute the same log-probs, gradients and responses."""

import copy
import os
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.pairs import GPT2, LLAMA, assert_same, loss_and_gradients, model
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaConfig, Mamba2Config
from transformers.pytorch_utils import Conv1D

from harness import TinyRun
from rlhf.models import Policy
from rlhf.models.optimizations import matrix_products
from rlhf.models.optimizations.matrix_products import (
    KERNEL_CACHES,
    FusedLinear,
    gains_from_onednn,
    linear,
    uses_onednn,
)
from rlhf.sampling import LocalSampler, SamplingParams
from rlhf.speed import speed

MODELS = {
    "llama": LLAMA,
    "llama with biases": LlamaConfig(**{**LLAMA.to_diff_dict(), "attention_bias": True, "mlp_bias": True}),
    "gpt2": GPT2,
    "mamba2": Mamba2Config(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, state_size=8, n_groups=1
    ),
}
AMD, INTEL = "AMD EPYC 9755", "Intel Xeon"


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let oneDNN compute products of any size, and return a list of the shapes that it has computed."""
    shapes: list[tuple[int, ...]] = []
    compute = matrix_products._onednn

    def recording(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append((*x.shape, len(weight)))
        return compute(x, weight, bias)

    monkeypatch.setattr(matrix_products, "_onednn", recording)
    monkeypatch.setattr(matrix_products, "MIN_MULTIPLICATIONS", 1)
    return shapes


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_onednn_changes_nothing(name: str, shared: bool, calls: list[Any]) -> None:
    policy = Policy(model(MODELS[name]))
    with speed(onednn_products=False):
        calls.clear()
        expected = loss_and_gradients(policy, shared=shared)
        assert calls == []
    with speed(onednn_products=True):
        assert_same(loss_and_gradients(policy, shared=shared), expected)
        # The products of a forward pass, and two of each of them in a backward pass.
        assert len(calls) >= 3 * sum(isinstance(part, nn.Linear | Conv1D) for part in policy.modules())


@pytest.mark.parametrize("name", MODELS)
def test_responses_are_the_same(name: str, tokenizer: Any, calls: list[Any]) -> None:
    """Without the lean decoder, the modules of transformers are used: only ``Policy`` changes them."""
    lm, found = model(MODELS[name]), []
    for onednn, lean in ((False, True), (True, True), (True, False)):
        calls.clear()
        torch.manual_seed(0)
        with speed(onednn_products=onednn, lean_decoding=lean):
            sampler = LocalSampler()
            sampler.sync(lm, tokenizer)
            params = SamplingParams(max_new_tokens=8)
            found.append(sampler.sample([[5, 6, 7], [8], [9, 10]], params).response_ids())
        assert bool(calls) is (onednn and lean)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("shape", [(7, 3, 5), (7, 5, 3), (2, 4, 3, 5)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_of_a_layer(shape: tuple[int, ...], has_bias: bool) -> None:
    """Results with more rows than columns and the reverse, and a frozen weight."""
    *rows, inputs, outputs = shape
    torch.manual_seed(0)
    parts = [torch.randn(*rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs) if has_bias else None]
    gradient = torch.randn(*rows, outputs)
    for frozen in (False, True):
        results = []
        for function in (F.linear, linear):
            leaves = [
                None if x is None else x.clone().requires_grad_(not frozen or i == 0) for i, x in enumerate(parts)
            ]
            with speed(onednn_products=True):
                output = function(*leaves)
                output.backward(gradient)
            results.append([output, *(None if leaf is None else leaf.grad for leaf in leaves)])
        for found, expected in zip(*results, strict=True):
            assert (found is None) is (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected)


def test_adapters_copies_and_pickles_keep_their_results(calls: list[Any]) -> None:
    policy = Policy(model(LLAMA))
    with speed(onednn_products=True):
        expected = loss_and_gradients(policy, shared=False)
        assert_same(loss_and_gradients(copy.deepcopy(policy), shared=False), expected)
        assert_same(loss_and_gradients(pickle.loads(pickle.dumps(policy)), shared=False), expected)
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "down_proj"]), policy.lm)
        calls.clear()
        torch.testing.assert_close(loss_and_gradients(policy, shared=False)[0], expected[0], rtol=1e-5, atol=1e-5)
    assert calls


def test_only_plain_layers_in_float32_use_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    with speed(onednn_products=True):
        assert uses_onednn(x, weight)
        assert not uses_onednn(x.bfloat16(), weight.bfloat16())
        assert not uses_onednn(x, weight.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not uses_onednn(x, weight)
        monkeypatch.setattr(matrix_products, "MIN_MULTIPLICATIONS", 2 * 4 * 3 + 1)
        assert not uses_onednn(x, weight)
    assert FusedLinear.input_width(nn.Linear(4, 3)) == FusedLinear.input_width(Conv1D(3, 4)) == 4
    assert FusedLinear.input_width(nn.LazyLinear(3)) is None


def test_the_first_kl_and_ratio_of_ppo_are_exact(tiny_run: TinyRun, calls: list[Any]) -> None:
    """Policy and reference model, and the two evaluations of a response, compute the same products."""
    with speed(onednn_products=True):
        trained = tiny_run.train("ppo")
    assert calls
    assert trained.recorder.rollouts[0]["objective/kl"] == 0.0
    assert trained.recorder.updates[0]["policy/ratio"] == 1.0


@pytest.mark.parametrize(
    ("name", "instructions", "expected"),
    [
        (AMD, ["avx512_f", "avx_vnni"], True),
        (AMD, ["avx512_f"], False),
        (AMD, ["avx2", "avx_vnni"], False),
        (INTEL, ["avx512_f", "avx_vnni"], False),
    ],
)
def test_the_processors_that_gain(
    name: str, instructions: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"cpu_name": name, **dict.fromkeys(instructions, True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    for backend in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(backend, "is_available", lambda: True)
    assert gains_from_onednn.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not gains_from_onednn.__wrapped__()


def test_few_kernels_are_kept_unless_the_environment_sets_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "unset below")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    Policy(model(LLAMA))
    assert [os.environ[name] for name in KERNEL_CACHES] == ["8", "7"]
