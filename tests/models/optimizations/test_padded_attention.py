"""Short packed rows attend in one padded batch, with the results of attention row by row."""

from typing import Any

import pytest
import torch
from models.pairs import GPT2, LLAMA, SIZES, assert_same, loss_and_gradients, model
from torch import Tensor
from transformers import DeepseekV3Config, GPT2Config, LlamaConfig, Qwen3Config

from rlhf.models import Policy
from rlhf.models.optimizations.layouts import SeparateRows, SharedPrompts
from rlhf.models.optimizations.packed_rows import allows_packed_rows
from rlhf.models.optimizations.padded_attention import MAX_TOKENS, PaddedRows

# The first layers of DeepSeek V3, which have no experts. Queries and keys have a width of 6.
LATENT = {
    **SIZES,
    "num_key_value_heads": 2,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 2,
    "qk_nope_head_dim": 4,
}
ARCHITECTURES = {
    "two heads share keys": LLAMA,
    "learned positions": GPT2,
    "norms of queries and keys": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "narrow values": DeepseekV3Config(**LATENT, v_head_dim=4),
    "wide values": DeepseekV3Config(**LATENT, v_head_dim=12),
}


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Allow any padding, and return a list to which each layer that attends in a padded batch adds its queries."""
    queries: list[Tensor] = []
    attend = PaddedRows.attend

    def recorded(self: PaddedRows, query: Tensor, *others: Any) -> Tensor:
        queries.append(query)
        return attend(self, query, *others)

    monkeypatch.setattr("rlhf.models.optimizations.padded_attention.MAX_PADDING", 100)
    monkeypatch.setattr(PaddedRows, "attend", recorded)
    return queries


def new_architecture(initializer_range: float) -> LlamaConfig:
    """A configuration of which no other test has probed a model: results are shared by architecture."""
    return LlamaConfig(**SIZES, num_key_value_heads=1, initializer_range=initializer_range)


def row_by_row(policy: Policy, *, shared: bool) -> tuple[Tensor, list[Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.models.optimizations.padded_attention.MAX_TOKENS", 0)
        return loss_and_gradients(policy, shared=shared)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_padded_batch_changes_nothing(name: str, shared: bool, padded: list[Tensor]) -> None:
    """Rows of 12, 9, 9, 21, 3 and 9 tokens, or of 24, 10 and 13 with prompts that are computed once."""
    policy = Policy(model(ARCHITECTURES[name]))
    padded.clear()
    expected = row_by_row(policy, shared=shared)
    assert padded == []
    assert_same(loss_and_gradients(policy, shared=shared), expected)
    assert [query.shape[2] for query in padded] == 2 * [47 if shared else 63]


def test_models_whose_padded_batch_fails_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PaddedRows, "attend", lambda rows, query, *others: torch.zeros_like(query).transpose(1, 2))
    assert not allows_packed_rows(model(new_architecture(0.03)).base_model)


def test_models_are_packed_whatever_the_default_dtype_is() -> None:
    """Under bf16-true, Lightning opens models, in float32, with bfloat16 as the default dtype."""
    trunk = model(new_architecture(0.04)).base_model
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert allows_packed_rows(trunk)
    finally:
        torch.set_default_dtype(torch.float32)


def test_dropout_attends_row_by_row(padded: list[Tensor]) -> None:
    """Dropout is drawn by SDPA, and has other random numbers in a padded batch."""
    policy = Policy(model(GPT2Config(**{**GPT2.to_diff_dict(), "attn_pdrop": 0.5})).train())
    padded.clear()
    loss_and_gradients(policy, shared=False)
    assert padded == []
    policy.eval()
    loss_and_gradients(policy, shared=False)
    assert len(padded) == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mixed_precision_attends_in_float32(name: str, padded: list[Tensor]) -> None:
    policy = Policy(model(ARCHITECTURES[name]))
    padded.clear()
    expected, _ = loss_and_gradients(policy, shared=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = loss_and_gradients(policy, shared=False)
    assert [query.dtype for query in padded] == 4 * [torch.float32]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)  # bfloat16 has 8 bits
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("lengths", "is_padded"),
    [([MAX_TOKENS, 120], True), ([MAX_TOKENS + 1, 120], False), ([100, 90, 80], True), ([100, 20, 20], False)],
)
def test_long_rows_and_much_padding_attend_row_by_row(lengths: list[int], is_padded: bool) -> None:
    layout = SeparateRows.of(lengths)
    assert (PaddedRows.of(layout, torch.arange(sum(lengths))) is not None) is is_padded


def test_the_bias_hides_the_other_response() -> None:
    """Of a prompt of one token and two responses of one and two tokens."""
    rows = PaddedRows.of(SharedPrompts([(1, 1, 2)]), torch.arange(4))
    assert rows is not None
    assert (rows.bias[0] == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
