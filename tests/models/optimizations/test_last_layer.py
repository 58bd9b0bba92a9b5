"""A last layer whose MLP computes some tokens only changes log-probs, scores and gradients by rounding only."""

import pytest
import torch
from models.pairs import GPT2, LLAMA, SIZES, assert_same, loss_and_gradients, model, pair_batch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, MambaConfig, MixtralConfig, PreTrainedModel

from rlhf.models import Policy, ScalarHead, ScalarModel, allows_shared_prompts
from rlhf.models.optimizations.last_layer import allows_partial_last_layer, last_layer
from rlhf.speed import speed

ARCHITECTURES = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "parallel attention": GPTNeoXConfig(**SIZES),
    "mixture of experts": MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=4),
}


def count_of_mlp(lm: PreTrainedModel) -> list[int]:
    """Return a list to which every call of the MLP of the last layer adds its number of tokens."""
    counts: list[int] = []
    last_layer(lm.base_model).mlp.register_forward_hook(
        lambda mlp, inputs, output: counts.append(output.shape[:-1].numel())
    )
    return counts


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("packed", "groups"), [(True, 1), (False, 1), (False, 3)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_states_before_responses_are_computed(
    name: str, packed: bool, groups: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs whose prompt is computed once use the state of its last token twice."""
    monkeypatch.setattr("rlhf.models.trunk.GROUP_TOKENS", 0)
    monkeypatch.setattr("rlhf.models.optimizations.last_layer.MAX_USED", 1)
    lm = model(ARCHITECTURES[name])
    policy = Policy(lm)
    with speed(packed_rows=False, row_groups=1, shared_prompts=False, partial_last_layer=False):
        expected = loss_and_gradients(policy, shared=False)
    allows_shared_prompts(lm.base_model)
    counts = count_of_mlp(lm)
    with speed(packed_rows=packed, row_groups=groups):
        found = loss_and_gradients(policy, shared=shared)
    assert sum(counts) == 31  # response tokens
    assert_same(found, expected)


@pytest.mark.parametrize("shared", [False, True])
def test_a_reward_model_computes_one_token_of_each_sequence(shared: bool) -> None:
    lm = model(LLAMA)
    scalar_model = ScalarModel(lm.base_model, ScalarHead(16))
    tokens, mask, _, lengths, starts = pair_batch()

    def scores_and_gradients() -> tuple[Tensor, list[Tensor]]:
        scalar_model.zero_grad()
        scores = scalar_model.scores(tokens, mask, lengths=lengths, shared_tokens=starts if shared else ())
        (scores[:, 0] * torch.linspace(-1, 1, len(scores))).sum().backward()
        return scores.detach(), [p.grad.clone() for p in scalar_model.parameters() if p.grad is not None]

    allows_shared_prompts(lm.base_model)
    counts = count_of_mlp(lm)
    with speed(packed_rows=False, row_groups=1, partial_last_layer=False):
        expected = scores_and_gradients()
    with speed(packed_rows=False, row_groups=1):
        found = scores_and_gradients()
    assert counts == [3 * 24 if shared else 6 * 21, 6]
    assert_same(found, expected)


def test_padding_on_the_left_changes_nothing() -> None:
    lm = model(LLAMA)
    policy, (tokens, mask, response, *_) = Policy(lm), pair_batch()
    expected = policy(tokens, mask, response).logprobs[response]
    counts = count_of_mlp(lm)
    found = policy(*(nn.functional.pad(x, (2, 0)) for x in (tokens, mask, response))).logprobs[:, 2:][response]
    assert counts == [31]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class MixedTokens(nn.Module):
    """Adds the mean of all states of a row."""

    def forward(self, states: Tensor) -> Tensor:
        return states + states.mean(dim=1, keepdim=True)


def test_other_architectures_compute_every_token() -> None:
    """Mamba has no MLP, and tokens mix after the last MLP of the second model."""
    mixing = model(LLAMA).base_model
    mixing.norm = MixedTokens()
    assert not allows_partial_last_layer(mixing)
    assert not allows_partial_last_layer(
        model(MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1)).base_model
    )


@pytest.mark.parametrize("reason", ["recomputed", "dropout", "most tokens are used"])
def test_every_token_is_computed_where_selecting_gains_nothing(reason: str) -> None:
    lm = model(GPT2)
    policy, (tokens, mask, response, *_) = Policy(lm), pair_batch()
    if reason == "recomputed":
        lm.gradient_checkpointing_enable()
    elif reason == "dropout":
        lm.train()
    else:
        response = mask.clone()
        response[:, 0] = False
        tokens, mask, response = (x[:1, :12] for x in (tokens, mask, response))  # a row of 12 tokens
    counts = count_of_mlp(lm)
    with speed(packed_rows=False, row_groups=1):
        policy(tokens, mask, response)
    assert counts == [tokens.numel()]
