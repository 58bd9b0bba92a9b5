"""Short rows attend in float32 in any precision of the model on a CPU."""

from typing import Any

import pytest
import torch
from models.pairs import LLAMA, model
from torch import Tensor

from rlhf.models import Policy
from rlhf.models.optimizations import packed_rows


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.dtype]]:
    """Number of queries and dtype of the result of each call of SDPA."""
    calls: list[tuple[int, torch.dtype]] = []
    attend = packed_rows.sdpa_attention_forward

    def recording(module: Any, query: Tensor, *others: Any, **keywords: Any) -> tuple[Tensor, None]:
        attended, weights = attend(module, query, *others, **keywords)
        calls.append((query.shape[2], attended.dtype))
        return attended, weights

    monkeypatch.setattr(packed_rows, "sdpa_attention_forward", recording)
    return calls


def logprobs(policy: Policy, lengths: list[int]) -> Tensor:
    tokens = torch.arange(len(lengths) * max(lengths)).view(len(lengths), -1) % 60
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    response = mask.clone()
    response[:, 0] = False
    return policy(tokens, mask, response, lengths=lengths).logprobs


@pytest.mark.parametrize("mixed", [True, False])
def test_rows_of_bfloat16_attend_in_float32_up_to_a_length(
    mixed: bool, computed: list[tuple[int, torch.dtype]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With padding of more than half of the batch, so that rows attend one by one. Two layers attend."""
    monkeypatch.setattr(packed_rows, "MAX_FLOAT32_TOKENS", 20)
    policy = Policy(model(LLAMA))
    expected = logprobs(policy, [20, 21, 4])
    if not mixed:
        policy.bfloat16()
    computed.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = logprobs(policy, [20, 21, 4])
    assert computed == 2 * [(20, torch.float32), (21, torch.bfloat16), (4, torch.float32)]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.1)  # bfloat16 has 8 bits


def test_the_rejected_response_of_a_shared_row_counts_by_itself(computed: list[tuple[int, torch.dtype]]) -> None:
    """A pair with 500 tokens of a prompt and responses of 12 tokens has 524 tokens, and sequences of 512."""
    policy = Policy(model(LLAMA))
    tokens = (torch.arange(512) % 60).repeat(2, 1)
    tokens[1, 500:] = 7
    mask = torch.ones_like(tokens, dtype=torch.bool)
    response = mask & (torch.arange(512) >= 500)
    computed.clear()
    with torch.autocast("cpu", torch.bfloat16):
        policy(tokens, mask, response, lengths=[512, 512], shared_tokens=[500, 500])
    assert computed == 2 * [(512, torch.float32), (12, torch.float32)]
