"""Scores are read at the last real token, and a head is never initialized at random when weights are loaded."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import ConfigError
from rlhf.models import RewardModelEnsemble, ScalarHead, ScalarModel

ROW = torch.tensor([5, 260, 2, 3, 99, 41, 2])  # with an EOS (2) in the middle as well


def scalar_model(lm: PreTrainedModel, mean: float = 0.0) -> ScalarModel:
    torch.manual_seed(1)
    return ScalarModel(lm.base_model, ScalarHead(32), reward_mean=mean)


def by_hand(lm: PreTrainedModel, model: ScalarModel, row: Tensor) -> Tensor:
    """w . h + b at the last token of the row, without padding."""
    hidden = lm.base_model(input_ids=row[None]).last_hidden_state[0, -1]
    (layer,) = model.head.layers
    return hidden @ layer.weight[0] + layer.bias[0]


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 4), (4, 0), (2, 2)])
@pytest.mark.parametrize("padding", [0, 2, 77])
def test_the_score_is_read_at_the_last_real_token(lm: PreTrainedModel, left: int, right: int, padding: int) -> None:
    """The score is w . h + b at the last real token, with padding on either side, also if it is EOS."""
    model = scalar_model(lm)
    tokens = torch.nn.functional.pad(ROW[None], (left, right), value=padding)
    mask = torch.nn.functional.pad(torch.ones_like(ROW[None], dtype=torch.bool), (left, right))
    torch.testing.assert_close(model(tokens, mask)[0], by_hand(lm, model, ROW))


def test_a_score_does_not_depend_on_other_rows(lm: PreTrainedModel) -> None:
    """A batch of rows with 7, 3 and 9 tokens has the scores of the three rows alone."""
    model = scalar_model(lm)
    rows = [ROW, ROW[:3], torch.arange(20, 29)]
    tokens, mask = torch.full((3, 9), 2), torch.zeros(3, 9, dtype=torch.bool)
    for index, row in enumerate(rows):
        start = 9 - len(row) if index == 1 else 0  # the second row is padded on the left
        tokens[index, start : start + len(row)], mask[index, start : start + len(row)] = row, True
    torch.testing.assert_close(model(tokens, mask), torch.stack([by_hand(lm, model, row) for row in rows]))


def test_reward_mean_is_subtracted_from_scores_and_values(lm: PreTrainedModel) -> None:
    """With a mean of 1.5, scores and values are 1.5 lower."""
    plain, centered = scalar_model(lm), scalar_model(lm, mean=1.5)
    mask = torch.ones_like(ROW[None], dtype=torch.bool)
    torch.testing.assert_close(centered(ROW[None], mask), plain(ROW[None], mask) - 1.5)
    hidden = torch.randn(2, 3, 32)
    torch.testing.assert_close(centered.values(hidden), plain.head(hidden) - 1.5)


def test_the_value_at_the_last_token_is_the_score(lm: PreTrainedModel) -> None:
    """A critic that starts from the reward model says the score where the score is read."""
    model, mask = scalar_model(lm, mean=0.5), torch.ones_like(ROW[None], dtype=torch.bool)
    hidden = lm.base_model(input_ids=ROW[None]).last_hidden_state
    assert model.values(hidden).shape == (1, 7)
    torch.testing.assert_close(model.values(hidden)[:, -1], model(ROW[None], mask))


@pytest.mark.parametrize(("num_layers", "fan_in"), [(1, 4095), (2, 1023), (3, 1023)])
def test_the_last_layer_is_initialized_as_published(num_layers: int, fan_in: int) -> None:
    """N(0, 1/sqrt(d + 1)), bias 0: sqrt(4096) = 64 and sqrt(1024) = 32, so std 1/64 and 1/32 (detail 11 of N+)."""
    torch.manual_seed(0)
    head = ScalarHead(4095, hidden_dim=1023, num_layers=num_layers)
    last = head.layers[-1]
    assert last.in_features == fan_in
    # The standard error of a standard deviation over d draws is 1 / sqrt(2 d): 1.1 % and 2.2 %. Allow four of them.
    assert last.weight.std().item() * (fan_in + 1) ** 0.5 == pytest.approx(1, abs=4 / (2 * fan_in) ** 0.5)
    assert last.bias.item() == 0


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_num_layers_are_linear_layers_with_gelu_between(num_layers: int) -> None:
    """The head is the composition of its linear layers, with GELU, x * Phi(x), between them."""
    torch.manual_seed(0)
    head = ScalarHead(6, hidden_dim=5, num_layers=num_layers)
    linear = [layer for layer in head.layers if isinstance(layer, torch.nn.Linear)]
    widths = [6] + [5] * (num_layers - 1) + [1]
    assert [(layer.in_features, layer.out_features) for layer in linear] == list(pairwise(widths))
    x = torch.randn(3, 6)
    expected = x
    for layer in linear[:-1]:
        expected = expected @ layer.weight.T + layer.bias
        expected = expected * 0.5 * (1 + torch.erf(expected / 2**0.5))
    expected = (expected @ linear[-1].weight.T + linear[-1].bias)[:, 0]
    torch.testing.assert_close(head(x), expected)


def test_a_head_without_layers_is_rejected() -> None:
    with pytest.raises(
        ConfigError, match=r"^stage\.num_layers must be an integer of at least 1, got 0\.\n  Set stage\.num_layers=1\."
    ):
        ScalarHead(4, num_layers=0)
    with pytest.raises(ConfigError, match=r"^stage\.num_heads must be an integer of at least 1, got 0\."):
        ScalarHead(4, num_heads=0)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_heads_are_independent_mlps(num_layers: int) -> None:
    """Three heads with separate initial weights; the output is their mean."""
    torch.manual_seed(0)
    head = ScalarHead(6, hidden_dim=5, num_layers=num_layers, num_heads=3)
    x = torch.randn(2, 7, 6)
    each = [head.layers(x), head.others[0](x), head.others[1](x)]
    assert head.scores(x).shape == (2, 7, 3)
    torch.testing.assert_close(head.scores(x), torch.cat(each, dim=-1))
    torch.testing.assert_close(head(x), (each[0] + each[1] + each[2])[..., 0] / 3)
    weights = [mlp[-1].weight for mlp in (head.layers, *head.others)]
    assert not any(torch.equal(one, other) for one, other in pairwise([*weights, weights[0]]))
    assert len({weight.data_ptr() for weight in head.parameters()}) == 3 * 2 * num_layers


def test_more_heads_do_not_change_the_first_one() -> None:
    """The first head is initialized first, so its weights do not depend on the number of heads."""
    torch.manual_seed(0)
    one = ScalarHead(6, hidden_dim=5, num_layers=2)
    torch.manual_seed(0)
    four = ScalarHead(6, hidden_dim=5, num_layers=2, num_heads=4)
    assert [name for name, _ in one.named_parameters()] == [
        "layers.0.weight",
        "layers.0.bias",
        "layers.2.weight",
        "layers.2.bias",
    ]
    assert all(torch.equal(weight, four.get_parameter(name)) for name, weight in one.named_parameters())


def test_each_head_has_a_separate_reward_mean(lm: PreTrainedModel) -> None:
    """Two heads with means 1 and 5: scores are 1 and 5 lower, and their mean is 3 lower."""
    torch.manual_seed(1)
    model, mask = ScalarModel(lm.base_model, ScalarHead(32, num_heads=2)), torch.ones_like(ROW[None], dtype=torch.bool)
    plain = model.scores(ROW[None], mask)
    torch.testing.assert_close(plain[0, 0], by_hand(lm, model, ROW))
    model.reward_mean.copy_(torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(model.scores(ROW[None], mask), plain - torch.tensor([[1.0, 5.0]]))
    torch.testing.assert_close(model(ROW[None], mask), plain.mean(dim=1) - 3)
    hidden = lm.base_model(input_ids=ROW[None]).last_hidden_state
    assert model.values(hidden).shape == (1, 7)
    torch.testing.assert_close(model.values(hidden)[:, -1], model(ROW[None], mask))


def test_an_ensemble_has_all_heads_of_all_members(lm: PreTrainedModel) -> None:
    """A member with one head and one with two heads give three scores in that order."""
    torch.manual_seed(1)
    members = [ScalarModel(lm.base_model, ScalarHead(32, num_heads=heads), reward_mean=heads) for heads in (1, 2)]
    ensemble, mask = RewardModelEnsemble(members), torch.ones_like(ROW[None], dtype=torch.bool)
    one, two = (member.scores(ROW[None], mask) for member in members)
    assert (one.shape, two.shape) == ((1, 1), (1, 2))
    assert torch.equal(ensemble.scores(ROW[None], mask), torch.cat([one, two], dim=1))
    torch.testing.assert_close(ensemble(ROW[None], mask), (one[:, 0] + two[:, 0] + two[:, 1]) / 3)
    assert ensemble.state_dict().keys() >= {"members.0.reward_mean", "members.1.head.others.0.0.weight"}
    with pytest.raises(ConfigError, match="must have at least one member"):
        RewardModelEnsemble([])


def test_scores_are_float32_in_any_precision_of_the_trunk() -> None:
    """The hidden states, and the head as well, may be in bfloat16."""
    hidden = torch.randn(2, 4, dtype=torch.bfloat16)
    assert ScalarHead(4)(hidden).dtype == torch.float32
    assert ScalarHead(4).to(torch.bfloat16)(hidden).dtype == torch.float32


def test_a_trunk_with_an_output_layer_is_rejected(lm: PreTrainedModel) -> None:
    """The base model of Llama 4 is the language model itself, which returns logits instead of hidden states."""
    with pytest.raises(ConfigError, match=r"is not supported\. Its output embedding cannot be separated"):
        ScalarModel(lm, ScalarHead(32))


def test_loading_weights_without_a_head_fails(lm: PreTrainedModel) -> None:
    """Otherwise, the head would keep its random initial weights."""
    weights = scalar_model(lm).state_dict()
    without = {name: value for name, value in weights.items() if not name.startswith("head.")}
    assert 0 < len(without) < len(weights)
    with pytest.raises(RuntimeError, match=r"head\.layers\.0\.weight"):
        scalar_model(lm).load_state_dict(without)
    with pytest.raises(RuntimeError, match="reward_mean"):
        scalar_model(lm).load_state_dict({name: value for name, value in weights.items() if name != "reward_mean"})


def test_the_state_dict_contains_weights_and_reward_mean(lm: PreTrainedModel) -> None:
    """Loaded into a model with other weights, it reproduces the scores exactly."""
    first, mask = scalar_model(lm, mean=0.7), torch.ones_like(ROW[None], dtype=torch.bool)
    expected = first(ROW[None], mask)
    second = ScalarModel(lm.base_model, ScalarHead(32))
    assert not torch.allclose(second(ROW[None], mask), expected)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(ROW[None], mask), expected)


def test_a_head_computes_in_float32_under_autocast() -> None:
    """Of 4000 different scores, bfloat16 would leave fewer than half, and ties count as errors of a reward model."""
    torch.manual_seed(0)
    head, hidden = ScalarHead(64, hidden_dim=16, num_layers=2, num_heads=2), torch.randn(4000, 64)
    expected = head.scores(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        found = head.scores(hidden)
    assert torch.equal(found, expected)
    assert len(found[:, 0].unique()) > 3900


def test_a_head_in_half_precision_computes_in_float32() -> None:
    """Under bf16-true, only the weights are rounded: the output is that of a float32 head with the rounded weights."""
    torch.manual_seed(0)
    head, hidden = ScalarHead(64, hidden_dim=16, num_layers=2), torch.randn(50, 64).bfloat16()
    rounded = ScalarHead(64, hidden_dim=16, num_layers=2)
    rounded.load_state_dict({name: weight.bfloat16().float() for name, weight in head.state_dict().items()})
    assert torch.equal(head.bfloat16()(hidden), rounded(hidden.float()))
    head(hidden).sum().backward()
    assert head.layers[0].weight.grad.dtype == torch.bfloat16


def test_the_reward_mean_keeps_its_precision(lm: PreTrainedModel) -> None:
    """Under bf16-true, Lightning casts the model. In bfloat16, a mean of 101.3 would become 101.5."""
    model = scalar_model(lm, mean=101.3).bfloat16()
    assert model.reward_mean.dtype == torch.float32
    assert model.reward_mean.item() == pytest.approx(101.3)
    assert model.to("meta").reward_mean.device.type == "meta"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_reward_mean_does_not_depend_on_the_default_dtype(lm: PreTrainedModel) -> None:
    """Under bf16-true, Lightning also opens models with bfloat16 as the default dtype."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = scalar_model(lm, mean=101.3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.reward_mean.item() == pytest.approx(101.3)


@pytest.mark.parametrize("left", [0, 3])
def test_token_values_are_read_before_each_response_token(lm: PreTrainedModel, left: int) -> None:
    """The value at token t comes from the hidden state of token t - 1; it is 0 outside of the response."""
    model, mask = scalar_model(lm, mean=0.5), torch.ones_like(ROW[None], dtype=torch.bool)
    response_mask = mask.clone()
    response_mask[:, :3] = False
    expected = model.values(lm.base_model(input_ids=ROW[None]).last_hidden_state)[:, 2:-1]
    pad = torch.nn.functional.pad
    found = model.token_values(pad(ROW[None], (left, 2), value=9), pad(mask, (left, 2)), pad(response_mask, (left, 2)))
    torch.testing.assert_close(found[:, left + 3 : -2], expected)
    assert found.count_nonzero() == 4
