"""Log-probs are those of the plain model, whatever surrounds the row in its batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from rlhf.models import Frozen, Policy, backbone, disable_dropout, hidden_states

ROW = torch.tensor([[5, 260, 17, 3, 99, 41, 2]])
TINY = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def everything(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens real, and all but the first (which nothing predicts) scored."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    chosen = mask.clone()
    chosen[:, 0] = False
    return mask, chosen


def padded(row: Tensor, left: int, right: int, garbage: Callable[[int], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    mask, chosen = everything(row)
    tokens = torch.cat([garbage(left)[None], row, garbage(right)[None]], dim=1)
    return tokens, nn.functional.pad(mask, (left, right)), nn.functional.pad(chosen, (left, right))


def test_logprobs_entropy_and_hits_are_those_of_the_plain_model(lm: PreTrainedModel) -> None:
    """log pi(token t) = log_softmax of the plain logits at t-1; entropy = -sum p log p; a hit is the argmax."""
    tokens = torch.cat([ROW, ROW.flip(1)])
    with torch.no_grad():
        expected = lm(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)
    tokens[0, 3] = expected[0, 2].argmax()  # one hit at least
    with torch.no_grad():
        expected = lm(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)

    mask, chosen = everything(tokens)
    scores = Policy(lm)(tokens, mask, chosen)

    picked = expected.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(scores.logprobs[:, 1:].detach(), picked)
    torch.testing.assert_close(scores.entropy[:, 1:], -(expected.exp() * expected).sum(dim=-1))
    assert torch.equal(scores.is_argmax[:, 1:], expected.argmax(dim=-1) == tokens[:, 1:])
    assert scores.is_argmax[0, 3]
    assert not scores.entropy.requires_grad


def test_what_is_not_chosen_is_zero(lm: PreTrainedModel) -> None:
    """Only the answer, tokens 4 to 6, is scored: 3 log-probs below 0, and 0 everywhere else."""
    mask, chosen = everything(ROW)
    chosen[:, :4] = False
    scores = Policy(lm)(ROW, mask, chosen)
    assert (scores.logprobs != 0).tolist() == chosen.tolist()
    assert (scores.entropy != 0).tolist() == chosen.tolist()


@pytest.mark.parametrize(("left", "right"), [(0, 3), (3, 0), (2, 5)])
@pytest.mark.parametrize("token", [0, 2, 77])  # pad, eos, any word
def test_padding_changes_nothing(lm: PreTrainedModel, left: int, right: int, token: int) -> None:
    """The same row alone and between padding of any side, length and token, EOS included."""
    policy = Policy(lm)
    alone = policy(ROW, *everything(ROW))
    tokens, mask, chosen = padded(ROW, left, right, lambda count: torch.full((count,), token))
    between = policy(tokens, mask, chosen)
    place = slice(left, left + ROW.shape[1])
    torch.testing.assert_close(between.logprobs[:, place], alone.logprobs)
    torch.testing.assert_close(between.entropy[:, place], alone.entropy)
    torch.testing.assert_close(between.hidden[:, place], alone.hidden)


def test_neighbours_and_their_side_of_padding_change_nothing(lm: PreTrainedModel) -> None:
    """A batch that mixes a long row, left padding and right padding of garbage gives each row what it gets alone."""
    torch.manual_seed(1)
    rows = [torch.randint(3, 300, (1, length)) for length in (11, 4, 7)]
    policy = Policy(lm)
    room = [11 - row.shape[1] for row in rows]
    sides = [(0, room[0]), (room[1], 0), (0, room[2])]
    parts = [padded(row, *side, lambda n: torch.randint(300, (n,))) for row, side in zip(rows, sides, strict=True)]
    tokens, mask, chosen = (torch.cat(part) for part in zip(*parts, strict=True))
    together = policy(tokens, mask, chosen).logprobs
    for index, row in enumerate(rows):
        alone = policy(row, *everything(row)).logprobs
        torch.testing.assert_close(together[index][chosen[index]], alone[0, 1:])


def test_padding_gets_no_gradient(lm: PreTrainedModel) -> None:
    """The embedding of a token that stands only on padding does not move; that of a real token does."""
    lm.set_output_embeddings(nn.Linear(32, 300, bias=False))  # not tied, so that only reading moves the embedding
    tokens, mask, chosen = padded(ROW, 2, 3, lambda count: torch.full((count,), 77))
    Policy(lm)(tokens, mask, chosen).logprobs.sum().backward()
    moved = lm.get_input_embeddings().weight.grad.abs().sum(dim=1) > 0
    assert not moved[77]
    assert moved[ROW[0, :-1]].all()


def test_temperature_divides_the_logits(lm: PreTrainedModel) -> None:
    """At temperature 0.5 the distribution is softmax(2 x logits)."""
    with torch.no_grad():
        expected = (2 * lm(input_ids=ROW).logits[:, :-1]).log_softmax(dim=-1)
    scores = Policy(lm)(ROW, *everything(ROW), temperature=0.5)
    torch.testing.assert_close(scores.logprobs[:, 1:].detach(), expected.gather(-1, ROW[:, 1:, None])[..., 0])
    torch.testing.assert_close(scores.entropy[:, 1:], -(expected.exp() * expected).sum(dim=-1))


def test_pieces_without_gradient_equal_the_whole_with_it(lm: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 tokens in pieces of 5, 5 and 2: the same numbers."""
    monkeypatch.setattr(backbone, "LOGIT_CHUNK_TOKENS", 5)
    tokens = torch.cat([ROW, ROW.flip(1)])
    whole = Policy(lm)(tokens, *everything(tokens))
    with torch.no_grad():
        pieces = Policy(lm)(tokens, *everything(tokens))
    torch.testing.assert_close(pieces.logprobs, whole.logprobs.detach())
    torch.testing.assert_close(pieces.entropy, whole.entropy)


def test_nothing_chosen_gives_zeros(lm: PreTrainedModel) -> None:
    """A batch without a token to score is no error: all log-probs are 0."""
    mask, _ = everything(ROW)
    assert Policy(lm)(ROW, mask, torch.zeros_like(mask)).logprobs.tolist() == [[0.0] * 7]


def special_heads() -> dict[str, PreTrainedModel]:
    """Models whose logits are more than output embedding times state, and one whose logits are just that."""
    torch.manual_seed(0)
    configs = {
        "capped": Gemma2Config(**TINY, head_dim=8, num_key_value_heads=2, final_logit_softcapping=30.0),
        "scaled up": CohereConfig(**TINY, num_key_value_heads=2, logit_scale=3.0),
        "scaled down": GraniteConfig(**TINY, num_key_value_heads=2, logits_scaling=4.0),
        "plain": LlamaConfig(**TINY, num_key_value_heads=2),
    }
    return {name: AutoModelForCausalLM.from_config(config).eval() for name, config in configs.items()}


@pytest.mark.parametrize("name", ["capped", "scaled up", "scaled down", "plain"])
@pytest.mark.parametrize("growth", [1, 1000])
def test_heads_that_cap_or_scale_give_the_models_own_logits(name: str, growth: float) -> None:
    """Cap and scale belong to log pi, also when the policy met them while its logits were still too small to be capped.

    The first call sees the new model; then the output embedding grows by ``growth``, as training does it.
    """
    lm, tokens = special_heads()[name], ROW % 60
    policy = Policy(lm)
    policy(tokens, *everything(tokens))
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(growth)
        expected = lm(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
    scores = policy(tokens, *everything(tokens))
    torch.testing.assert_close(scores.logprobs[:, 1:].detach(), expected)
    assert lm.model is lm.base_model  # the body is back in its place
    scores.logprobs.sum().backward()
    assert all(part.grad is not None for part in lm.parameters())


def gpt2(dropout: float) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        GPT2Config(
            vocab_size=300,
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def test_dropout_switched_off_makes_train_and_eval_agree() -> None:
    """A GPT-2 with dropout 0.5 gives other numbers in train mode; switched off, the very same."""
    lm = gpt2(dropout=0.5)
    with torch.no_grad():
        asleep, awake = lm.eval()(input_ids=ROW).logits, lm.train()(input_ids=ROW).logits
        assert not torch.allclose(asleep, awake)
        disable_dropout(lm)
        assert torch.equal(lm.train()(input_ids=ROW).logits, asleep)
        assert torch.equal(lm.eval()(input_ids=ROW).logits, asleep)


@pytest.mark.parametrize(
    "config",
    [
        # Llama keeps its attention dropout as a number of the attention module, not as an nn.Dropout
        LlamaConfig(**TINY, num_key_value_heads=2, attention_dropout=0.5),
        # Falcon's decoder layer reads it from the configuration, OPT also leaves out whole layers
        FalconConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, hidden_dropout=0.5),
        OPTConfig(
            vocab_size=60,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            dropout=0.0,
            layerdrop=0.5,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_dropout_kept_as_a_number_is_switched_off_too(config: PretrainedConfig) -> None:
    """Six passes in train mode: some differ from eval before, none after (one layer stays with chance 1/2)."""
    torch.manual_seed(0)
    lm, tokens = AutoModelForCausalLM.from_config(config), ROW % 60
    with torch.no_grad():
        expected = lm.eval()(input_ids=tokens).logits
        lm.train()
        assert not all(torch.equal(lm(input_ids=tokens).logits, expected) for _ in range(6))
        disable_dropout(lm)
        assert all(torch.equal(lm(input_ids=tokens).logits, expected) for _ in range(6))


class Owner(nn.Module):
    """Stands for a LightningModule: one part that learns, one that is frozen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.learns = nn.Linear(2, 2)
        self.reference = Frozen(model)


def test_frozen_is_neither_trained_nor_stored_nor_switched() -> None:
    """The owner sees only its own two tensors; train() leaves the frozen part in eval."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)).train()
    owner = Owner(model)
    assert [name for name, _ in owner.named_parameters()] == ["learns.weight", "learns.bias"]
    assert list(owner.state_dict()) == ["learns.weight", "learns.bias"]
    assert list(owner.buffers()) == []
    owner.train()
    assert owner.training
    assert not any(module.training for module in model.modules())


def test_frozen_gives_no_gradient_to_its_weights_and_none_to_its_input() -> None:
    """Its numbers are constants, whatever the caller's gradient mode."""
    model = nn.Linear(2, 2)
    frozen = Frozen(model)
    result = frozen(torch.ones(1, 2, requires_grad=True))
    assert not result.requires_grad
    assert not any(part.requires_grad for part in model.parameters())


def test_frozen_follows_its_owner() -> None:
    """owner.to(dtype) and owner.to(device) move the frozen weights along."""
    model = nn.Linear(2, 2)
    owner = Owner(model).to(torch.float64)
    assert {part.dtype for part in model.parameters()} == {torch.float64}
    owner.to("meta")
    assert {part.device.type for part in model.parameters()} == {"meta"}


def test_hidden_states_of_absolute_positions_count_from_the_first_real_token() -> None:
    """GPT-2 adds the embedding of the place: a left-padded row must begin at place 0."""
    trunk = gpt2(dropout=0.0).eval().base_model
    alone = hidden_states(trunk, ROW, torch.ones_like(ROW, dtype=torch.bool))
    tokens, mask, _ = padded(ROW, 4, 2, lambda count: torch.full((count,), 9))
    torch.testing.assert_close(hidden_states(trunk, tokens, mask)[:, 4:-2], alone)
