"""Which rows are computed together changes hidden states, log-probs and gradients by rounding only."""

from itertools import combinations
from math import inf
from typing import Any

import pytest
import torch
from models.pairs import GPT2, LLAMA, SIZES, assert_same, loss_and_gradients, model, pair_batch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DogeConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf.models import Policy
from rlhf.models.optimizations.packed_rows import allows_packed_rows
from rlhf.models.optimizations.shared_prompts import allows_shared_prompts
from rlhf.models.trunk import GROUP_TOKENS, prepare_trunk, split_by_length, states_before
from rlhf.speed import speed

MAMBA2 = Mamba2Config(
    vocab_size=60, hidden_size=16, state_size=8, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1, chunk_size=4
)
WITH_SHARING = {"llama": LLAMA, "gpt2": GPT2, "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)}
WITHOUT_SHARING = {
    "mamba": MambaConfig(vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=2),
    "mamba2": MAMBA2,
    "sliding window": MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=4),
    "ALiBi": BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2),
}


def count_tokens(lm: PreTrainedModel) -> list[int]:
    """Return a list to which every forward pass of the trunk adds its number of tokens."""
    counts: list[int] = []
    lm.base_model.register_forward_pre_hook(
        lambda module, args, keys: counts.append(keys["input_ids"].numel()), with_kwargs=True
    )
    return counts


@pytest.mark.parametrize("config", [LLAMA, GPT2, MAMBA2], ids=lambda config: config.model_type)
def test_groups_of_like_length_change_nothing(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.models.trunk.GROUP_TOKENS", 0)
    lm = model(config)
    policy = Policy(lm)
    with speed(packed_rows=False, row_groups=1):
        expected = loss_and_gradients(policy, shared=False)
    counts = count_tokens(lm)
    with speed(packed_rows=False, row_groups=3):
        found = loss_and_gradients(policy, shared=False)
    assert len(counts) == 3
    assert sum(counts) < 6 * 21
    assert_same(found, expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", WITH_SHARING)
def test_prompts_that_are_computed_once_change_nothing(name: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.models.trunk.GROUP_TOKENS", 0)
    lm = model(WITH_SHARING[name])
    policy = Policy(lm)
    assert allows_shared_prompts(lm.base_model)
    with speed(packed_rows=False, row_groups=1, shared_prompts=False):
        expected = loss_and_gradients(policy, shared=True)
    counts = count_tokens(lm)
    with speed(packed_rows=False, row_groups=groups):
        found = loss_and_gradients(policy, shared=True)
    assert sum(counts) == (3 * 24 if groups == 1 else 24 + 2 * 13)  # rows of 24, 10 and 13 tokens
    assert_same(found, expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", WITH_SHARING)
def test_packed_rows_change_nothing(name: str, shared: bool) -> None:
    """Rows of 12, 9, 9, 21, 3 and 9 tokens, or of 24, 10 and 13 with prompts that are computed once."""
    lm = model(WITH_SHARING[name])
    policy = Policy(lm)
    assert allows_shared_prompts(lm.base_model)
    with speed(packed_rows=False, row_groups=1, shared_prompts=False):
        expected = loss_and_gradients(policy, shared=shared)
    counts = count_tokens(lm)
    assert_same(loss_and_gradients(policy, shared=shared), expected)
    assert counts == [24 + 10 + 13 if shared else 12 + 9 + 9 + 21 + 3 + 9]


def test_rows_of_one_length_are_not_packed() -> None:
    """A batch without padding is computed as it is."""
    lm = model(LLAMA)
    policy = Policy(lm)
    shapes: list[torch.Size] = []
    lm.base_model.register_forward_pre_hook(
        lambda module, args, keys: shapes.append(keys["input_ids"].shape), with_kwargs=True
    )
    policy(*(x[1:3, :9] for x in pair_batch()[:3]))
    assert shapes == [(2, 9)]


def test_a_mask_that_the_model_computes_has_a_gradient() -> None:
    """The mask of Doge is zero until its weights are trained."""
    lm = AutoModelForCausalLM.from_config(DogeConfig(**SIZES, num_key_value_heads=2)).eval()
    policy = Policy(lm)
    assert not allows_packed_rows(lm.base_model)
    loss_and_gradients(policy, shared=False)
    for layer in lm.base_model.layers:
        assert not layer.self_attn.A.any()
        assert layer.self_attn.A.grad.any()


@pytest.mark.parametrize("name", WITHOUT_SHARING)
def test_other_architectures_compute_prompts_twice(name: str) -> None:
    lm = model(WITHOUT_SHARING[name])
    policy = Policy(lm)
    assert not allows_shared_prompts(lm.base_model)
    assert not allows_packed_rows(lm.base_model)
    with speed(row_groups=1):
        expected = loss_and_gradients(policy, shared=False)
        counts = count_tokens(lm)
        found = loss_and_gradients(policy, shared=True)
    assert counts == [6 * 21]
    assert torch.equal(found[0], expected[0])


def test_eager_attention_computes_prompts_twice() -> None:
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="eager")
    assert not allows_shared_prompts(lm.base_model)


@pytest.mark.parametrize("recomputed", [False, True])
def test_attention_computes_no_products_that_a_mask_would_remove(
    recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 9 + 3 + 12, 2 + 7 + 1 and 5 + 4 + 4 tokens.

    Attention of the first sequence is causal. The second one attends to the prompt and to itself. Recomputed layers use
    a mask, because they do not know the sizes.
    """
    sizes: list[tuple[int, int]] = []

    def recorded(module: Any, query: Tensor, key: Tensor, *others: Any, **keywords: Any) -> Any:
        sizes.append((query.shape[2], key.shape[2]))
        return sdpa_attention_forward(module, query, key, *others, **keywords)

    monkeypatch.setattr("rlhf.models.optimizations.packed_rows.sdpa_attention_forward", recorded)
    lm = model(LLAMA)
    policy = Policy(lm)
    if recomputed:
        lm.train().gradient_checkpointing_enable()
    with speed(packed_rows=False, row_groups=1, shared_prompts=False):
        expected = loss_and_gradients(policy, shared=True)
    sizes.clear()
    assert_same(loss_and_gradients(policy, shared=True), expected)
    of_a_layer = [(12, 12), (12, 21), (9, 9), (1, 3), (9, 9), (4, 9)]
    assert sizes == ([] if recomputed else 2 * of_a_layer)
    assert lm.config._attn_implementation == "sdpa"


def test_short_prompts_are_computed_twice() -> None:
    """Sharing saves less than one in 25 of the tokens: one of 12, 9, 9, 21, 3 and 9."""
    lm, (tokens, mask, response, lengths, _) = model(LLAMA), pair_batch()
    prepare_trunk(lm.base_model)
    positions, counts = response.nonzero(as_tuple=True), count_tokens(lm)
    with speed(packed_rows=False, row_groups=1):
        states_before(lm.base_model, tokens, mask, positions, lengths=lengths, shared_tokens=[1, 0, 0] * 2)
    assert counts == [6 * 21]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("groups", [1, 8])
def test_long_rows_do_not_change_the_positions_of_short_ones(groups: int, window: int | None) -> None:
    """LongRoPE has other frequencies above 12 tokens. Rows of 12, 9, 9, 21, 3 and 9 tokens, padded on either side.

    Models with a window are not packed.
    """
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 12, **factors}
    sizes = {**SIZES, "pad_token_id": 0, "max_position_embeddings": 48, "original_max_position_embeddings": 12}
    policy = Policy(model(Phi3Config(**sizes, sliding_window=window, rope_parameters=rope)))
    tokens, mask, response, lengths, shared = pair_batch()
    alone = [
        policy(*(x[i : i + 1, :length] for x in (tokens, mask, response))).logprobs for i, length in enumerate(lengths)
    ]
    expected = torch.cat(alone, dim=1)[0]
    padded_left = [
        torch.stack([row.roll(tokens.shape[1] - length) for row, length in zip(x, lengths, strict=True)])
        for x in (tokens, mask, response)
    ]
    with speed(row_groups=groups):
        found = policy(tokens, mask, response, lengths=lengths).logprobs[mask]
        pairs = policy(tokens, mask, response, lengths=lengths, shared_tokens=shared).logprobs[mask]
        left = policy(*padded_left).logprobs[padded_left[1]]
    for logprobs in (found, pairs, left):
        torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


def test_dropout_of_the_probe_is_off_and_training_goes_on() -> None:
    lm = model(GPT2).train()
    assert allows_shared_prompts(lm.base_model)
    assert allows_packed_rows(lm.base_model)
    assert lm.base_model.training


def test_before_is_the_next_token_shift() -> None:
    """The state before token t is that of token t - 1, in batches that are padded on either side."""
    trunk, (tokens, mask, response, *_) = model(LLAMA).base_model, pair_batch()
    alone = [trunk(input_ids=row[known][None]).last_hidden_state[0] for row, known in zip(tokens, mask, strict=True)]
    expected = torch.cat(
        [states[len(states) - count - 1 : -1] for states, count in zip(alone, response.sum(1), strict=True)]
    )
    for _ in range(2):
        found = states_before(trunk, tokens, mask, response.nonzero(as_tuple=True))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        tokens, mask, response = (
            torch.stack([row.roll(tokens.shape[1] - int(known.sum())) for row, known in zip(x, mask, strict=True)])
            for x in (tokens, mask, response)
        )


@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], [1, 500, 2, 480, 3, 300], list(range(1, 200, 9))])
@pytest.mark.parametrize(("groups", "boundary"), [(1, None), (2, None), (3, None), (2, 6), (3, 300), (3, 1000)])
def test_groups_are_the_cheapest_ones(lengths: list[int], groups: int, boundary: int | None) -> None:
    """Compared with every way to cut the sorted rows that no group crosses the boundary."""
    ordered = sorted(lengths)
    limit = max(lengths) if boundary is None else boundary

    def cost(cuts: tuple[int, ...]) -> float:
        pairs = list(zip([0, *cuts], [*cuts, len(ordered)], strict=True))
        if any(ordered[a] <= limit < ordered[b - 1] for a, b in pairs):
            return inf
        return sum((b - a) * ordered[b - 1] + GROUP_TOKENS for a, b in pairs)

    cheapest = min(cost(cuts) for k in range(groups) for cuts in combinations(range(1, len(ordered)), k))
    found = split_by_length(lengths, groups, boundary)
    assert not any(min(lengths[row] for row in rows) <= limit < width for rows, width in found)
    assert sorted(torch.cat([rows for rows, _ in found]).tolist()) == list(range(len(lengths)))
    assert all(width == max(lengths[row] for row in rows) for rows, width in found)
    assert sum(len(rows) * width + GROUP_TOKENS for rows, width in found) == cheapest
