"""Two models that compute at the same time give the same states and gradients as one after another."""

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models.pairs import GPT2, LLAMA, model, pair_batch
from torch import Tensor, nn
from transformers import Mamba2Config

from harness import TinyRun
from rlhf.models.optimizations.concurrent import can_compute_concurrently, concurrent_states
from rlhf.models.trunk import prepare_trunk, states_before
from rlhf.ppo import PPOModule
from rlhf.speed import speed
from rlhf.tensors import true_positions

MAMBA = Mamba2Config(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, state_size=4, n_groups=1, chunk_size=4
)
PAIRS = [(LLAMA, LLAMA), (GPT2, MAMBA), (MAMBA, LLAMA)]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The test suite runs with one thread, which computes one model after another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def trunks(first: Any = LLAMA, second: Any = LLAMA) -> tuple[nn.Module, nn.Module]:
    models = tuple(model(copy.deepcopy(config)).base_model for config in (first, second))
    for trunk in models:
        prepare_trunk(trunk)
    return models  # type: ignore[return-value]


def weighted_sum(states: Tensor) -> Tensor:
    return (states.float() * torch.linspace(-1, 1, states.numel()).view_as(states)).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("configs", PAIRS, ids=["llama and llama", "gpt2 and mamba2", "mamba2 and llama"])
def test_states_and_gradients_are_the_same(configs: tuple[Any, Any], dtype: torch.dtype) -> None:
    models = trunks(*configs)
    assert can_compute_concurrently(*models)
    tokens, mask, response, *_ = pair_batch()
    parameters = [parameter for trunk in models for parameter in trunk.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        expected = [states_before(trunk, tokens, mask, true_positions(response)) for trunk in models]
        found = concurrent_states(models, tokens, mask, response)
    torch.testing.assert_close(found, tuple(expected), rtol=1e-5, atol=1e-5)
    loss, other_loss = (weighted_sum(one) + 2 * weighted_sum(two) for one, two in (found, expected))
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(other_loss, parameters),
        rtol=1e-4,
        atol=1e-4,
    )


def test_both_passes_of_the_second_model_run_in_another_thread_with_half_of_the_threads() -> None:
    models = trunks()
    seen: list[tuple[str, bool, int]] = []

    def record(name: str) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        seen.append((name, is_main, torch.get_num_threads()))

    for name, trunk in zip(("first", "second"), models, strict=True):
        layer: Any = trunk.layers[0]
        layer.register_forward_hook(lambda *_, name=name: record(name))
        layer.register_full_backward_hook(lambda *_, name=name: record(name))
    first, second = concurrent_states(models, *pair_batch()[:3])
    (weighted_sum(first) + weighted_sum(second)).backward()
    assert sorted(seen) == [("first", True, 1)] * 2 + [("second", False, 1)] * 2
    assert torch.get_num_threads() == 2


def test_a_model_without_a_gradient_gets_none() -> None:
    """The states of one model are not used, and the other model is frozen in part."""
    models = trunks()
    models[1].layers.requires_grad_(False)  # type: ignore[union-attr,operator]
    _, states = concurrent_states(models, *pair_batch()[:3])
    weighted_sum(states).backward()
    assert all(parameter.grad is None for parameter in models[0].parameters())
    with_gradient = [name for name, parameter in models[1].named_parameters() if parameter.grad is not None]
    assert with_gradient == ["embed_tokens.weight", "norm.weight"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_stored(mode: Any) -> None:
    models = trunks()
    with mode():
        states = concurrent_states(models, *pair_batch()[:3])
    assert [one.requires_grad for one in states] == [False, False]
    assert [one.is_inference() for one in states] == [mode is torch.inference_mode] * 2


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_either_model_is_raised_after_both_have_stopped(failing: int) -> None:
    models = trunks()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    models[failing].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        concurrent_states(models, *pair_batch()[:3])
    assert torch.get_num_threads() == 2


def drop(first: Any, second: Any) -> None:
    second.layers[1].mlp.append_dropout = nn.Dropout(0.1)
    second.train()


def checkpoint(first: Any, second: Any) -> None:
    first.gradient_checkpointing_enable()


def share_config(first: Any, second: Any) -> None:
    second.config = first.config


def share_layer(first: Any, second: Any) -> None:
    second.layers[0] = first.layers[0]


def leave_cpu(first: Any, second: Any) -> None:
    second.to("meta")


@pytest.mark.parametrize("change", [drop, checkpoint, share_config, share_layer, leave_cpu])
def test_models_that_could_disturb_each_other_are_computed_one_after_another(change: Any) -> None:
    models = trunks()
    assert can_compute_concurrently(*models)
    change(*models)
    assert not can_compute_concurrently(*models)


def test_one_thread_and_the_switch_turn_it_off() -> None:
    models = trunks()
    with speed(concurrent_models=False):
        assert not can_compute_concurrently(*models)
    torch.set_num_threads(1)
    assert not can_compute_concurrently(*models)


# PPO


def train(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, *, concurrent: bool) -> tuple[Any, int]:
    """Train PPO, and count how often two models compute at the same time."""
    calls = 0

    def counting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return concurrent_states(*arguments)

    monkeypatch.setattr("rlhf.rl.models.concurrent_states", counting)
    with speed(concurrent_models=concurrent):
        return tiny_run.train("ppo", whiten_advantages=False), calls


def test_ppo_learns_the_same_and_the_first_ratio_and_kl_are_exact(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two evaluations, of two minibatches each, and four updates."""
    expected, calls = train(tiny_run, monkeypatch, concurrent=False)
    assert calls == 0
    found, calls = train(tiny_run, monkeypatch, concurrent=True)
    assert calls == 2 + 4
    assert found.recorder.rollouts[0]["objective/kl"] == 0.0
    module: PPOModule = found.module
    for one, other in zip(module.parameters(), expected.module.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
