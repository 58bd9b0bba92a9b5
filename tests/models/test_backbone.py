"""Log-probs equal those of the plain transformers model and do not depend on padding or other rows."""

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


def full_masks(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Attention mask of all tokens, and response mask of all tokens but the first, which nothing predicts."""
    attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
    response_mask = attention_mask.clone()
    response_mask[:, 0] = False
    return attention_mask, response_mask


def padded(row: Tensor, left: int, right: int, padding: Callable[[int], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, attention mask and response mask of a row with ``padding(count)`` token ids on both sides."""
    mask, chosen = full_masks(row)
    tokens = torch.cat([padding(left)[None], row, padding(right)[None]], dim=1)
    return tokens, nn.functional.pad(mask, (left, right)), nn.functional.pad(chosen, (left, right))


def test_logprobs_entropy_and_argmax_equal_those_of_the_plain_model(lm: PreTrainedModel) -> None:
    """log p(token t) is the log_softmax of the plain logits at t - 1, and entropy = -sum p log p."""
    tokens = torch.cat([ROW, ROW.flip(1)])
    with torch.no_grad():
        expected = lm(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)
    tokens[0, 3] = expected[0, 2].argmax()  # at least one token is the most likely one
    with torch.no_grad():
        expected = lm(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)

    mask, chosen = full_masks(tokens)
    scores = Policy(lm)(tokens, mask, chosen)

    picked = expected.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(scores.logprobs[:, 1:].detach(), picked)
    torch.testing.assert_close(scores.entropy[:, 1:], -(expected.exp() * expected).sum(dim=-1))
    assert torch.equal(scores.is_argmax[:, 1:], expected.argmax(dim=-1) == tokens[:, 1:])
    assert scores.is_argmax[0, 3]
    assert not scores.entropy.requires_grad


def test_outputs_outside_the_response_are_zero(lm: PreTrainedModel) -> None:
    """The response consists of tokens 4 to 6: 3 log-probs below 0, and 0 everywhere else."""
    mask, chosen = full_masks(ROW)
    chosen[:, :4] = False
    scores = Policy(lm)(ROW, mask, chosen)
    assert (scores.logprobs != 0).tolist() == chosen.tolist()
    assert (scores.entropy != 0).tolist() == chosen.tolist()


@pytest.mark.parametrize(("left", "right"), [(0, 3), (3, 0), (2, 5)])
@pytest.mark.parametrize("token", [0, 2, 77])  # padding token, EOS, a word
def test_padding_does_not_change_outputs(lm: PreTrainedModel, left: int, right: int, token: int) -> None:
    """The same row alone and with padding on either side, of any length and of any token, including EOS."""
    policy = Policy(lm)
    alone = policy(ROW, *full_masks(ROW))
    tokens, mask, chosen = padded(ROW, left, right, lambda count: torch.full((count,), token))
    surrounded = policy(tokens, mask, chosen)
    positions = slice(left, left + ROW.shape[1])
    torch.testing.assert_close(surrounded.logprobs[:, positions], alone.logprobs)
    torch.testing.assert_close(surrounded.entropy[:, positions], alone.entropy)
    torch.testing.assert_close(surrounded.hidden[:, positions], alone.hidden)


def test_other_rows_of_the_batch_do_not_change_outputs(lm: PreTrainedModel) -> None:
    """A batch with a long row, a left-padded row and a right-padded row, with random tokens as padding."""
    torch.manual_seed(1)
    rows = [torch.randint(3, 300, (1, length)) for length in (11, 4, 7)]
    policy = Policy(lm)
    missing = [11 - row.shape[1] for row in rows]
    sides = [(0, missing[0]), (missing[1], 0), (0, missing[2])]
    pieces = [padded(row, *side, lambda n: torch.randint(300, (n,))) for row, side in zip(rows, sides, strict=True)]
    tokens, mask, chosen = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
    together = policy(tokens, mask, chosen).logprobs
    for index, row in enumerate(rows):
        alone = policy(row, *full_masks(row)).logprobs
        torch.testing.assert_close(together[index][chosen[index]], alone[0, 1:])


def test_padding_has_no_gradient(lm: PreTrainedModel) -> None:
    """The embedding of a token that only occurs as padding has no gradient; those of real tokens have one."""
    lm.set_output_embeddings(nn.Linear(32, 300, bias=False))  # untied, so that only inputs reach the embedding
    tokens, mask, chosen = padded(ROW, 2, 3, lambda count: torch.full((count,), 77))
    Policy(lm)(tokens, mask, chosen).logprobs.sum().backward()
    has_gradient = lm.get_input_embeddings().weight.grad.abs().sum(dim=1) > 0
    assert not has_gradient[77]
    assert has_gradient[ROW[0, :-1]].all()


def test_temperature_divides_the_logits(lm: PreTrainedModel) -> None:
    """At temperature 0.5, the distribution is softmax(2 * logits)."""
    with torch.no_grad():
        expected = (2 * lm(input_ids=ROW).logits[:, :-1]).log_softmax(dim=-1)
    scores = Policy(lm)(ROW, *full_masks(ROW), temperature=0.5)
    torch.testing.assert_close(scores.logprobs[:, 1:].detach(), expected.gather(-1, ROW[:, 1:, None])[..., 0])
    torch.testing.assert_close(scores.entropy[:, 1:], -(expected.exp() * expected).sum(dim=-1))


def test_chunks_do_not_change_outputs(lm: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 tokens in chunks of 5, 5 and 2, with and without gradients."""
    monkeypatch.setattr(backbone, "LOGIT_CHUNK_TOKENS", 5)
    tokens = torch.cat([ROW, ROW.flip(1)])
    expected = Policy(lm)(tokens, *full_masks(tokens))
    with torch.no_grad():
        found = Policy(lm)(tokens, *full_masks(tokens))
    torch.testing.assert_close(found.logprobs, expected.logprobs.detach())
    torch.testing.assert_close(found.entropy, expected.entropy)


def test_an_empty_response_mask_gives_zeros(lm: PreTrainedModel) -> None:
    """A batch without response tokens is not an error."""
    mask, _ = full_masks(ROW)
    assert Policy(lm)(ROW, mask, torch.zeros_like(mask)).logprobs.tolist() == [[0.0] * 7]


def special_heads() -> dict[str, PreTrainedModel]:
    """Models that scale or cap their logits, and one whose logits are a linear function of the hidden state."""
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
def test_logits_are_capped_and_scaled_as_by_the_model(name: str, growth: float) -> None:
    """The kind of head is detected in the first call, while the logits are still too small for the cap to matter.

    After that call, the output embedding grows by the factor ``growth``, as it might in training.
    """
    lm, tokens = special_heads()[name], ROW % 60
    policy = Policy(lm)
    policy(tokens, *full_masks(tokens))
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(growth)
        expected = lm(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
    scores = policy(tokens, *full_masks(tokens))
    torch.testing.assert_close(scores.logprobs[:, 1:].detach(), expected)
    assert lm.model is lm.base_model  # the model still has its own trunk
    scores.logprobs.sum().backward()
    assert all(parameter.grad is not None for parameter in lm.parameters())


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


def test_train_and_eval_mode_agree_without_dropout() -> None:
    """A GPT-2 with dropout 0.5 gives different logits in train mode; with dropout disabled, the same ones."""
    lm = gpt2(dropout=0.5)
    with torch.no_grad():
        eval_logits, train_logits = lm.eval()(input_ids=ROW).logits, lm.train()(input_ids=ROW).logits
        assert not torch.allclose(eval_logits, train_logits)
        disable_dropout(lm)
        assert torch.equal(lm.train()(input_ids=ROW).logits, eval_logits)
        assert torch.equal(lm.eval()(input_ids=ROW).logits, eval_logits)


@pytest.mark.parametrize(
    "config",
    [
        # Llama stores its attention dropout as a float in the attention module, without an nn.Dropout.
        LlamaConfig(**TINY, num_key_value_heads=2, attention_dropout=0.5),
        # The decoder layer of Falcon reads it from the configuration. OPT also drops complete layers.
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
def test_dropout_stored_as_a_number_is_disabled(config: PretrainedConfig) -> None:
    """Of six passes in train mode, some differ from eval mode before dropout is disabled, and none afterwards."""
    torch.manual_seed(0)
    lm, tokens = AutoModelForCausalLM.from_config(config), ROW % 60
    with torch.no_grad():
        expected = lm.eval()(input_ids=tokens).logits
        lm.train()
        assert not all(torch.equal(lm(input_ids=tokens).logits, expected) for _ in range(6))
        disable_dropout(lm)
        assert all(torch.equal(lm(input_ids=tokens).logits, expected) for _ in range(6))


class Owner(nn.Module):
    """Like a LightningModule with a trained and a frozen model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trained = nn.Linear(2, 2)
        self.reference = Frozen(model)


def test_a_frozen_model_is_hidden_from_its_owner() -> None:
    """The owner has only its own two parameters, and ``train()`` leaves the frozen model in eval mode."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)).train()
    owner = Owner(model)
    assert [name for name, _ in owner.named_parameters()] == ["trained.weight", "trained.bias"]
    assert list(owner.state_dict()) == ["trained.weight", "trained.bias"]
    assert list(owner.buffers()) == []
    owner.train()
    assert owner.training
    assert not any(module.training for module in model.modules())


def test_a_frozen_model_has_no_gradients() -> None:
    """Neither its weights nor its inputs get gradients, in any gradient mode of the caller."""
    model = nn.Linear(2, 2)
    frozen = Frozen(model)
    result = frozen(torch.ones(1, 2, requires_grad=True))
    assert not result.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_model_follows_its_owner() -> None:
    """``owner.to(dtype)`` and ``owner.to(device)`` move the frozen weights as well."""
    model = nn.Linear(2, 2)
    owner = Owner(model).to(torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    owner.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_positions_count_from_the_first_real_token() -> None:
    """GPT-2 has absolute position embeddings, so a left-padded row must start at position 0."""
    trunk = gpt2(dropout=0.0).eval().base_model
    alone = hidden_states(trunk, ROW, torch.ones_like(ROW, dtype=torch.bool))
    tokens, mask, _ = padded(ROW, 4, 2, lambda count: torch.full((count,), 9))
    torch.testing.assert_close(hidden_states(trunk, tokens, mask)[:, 4:-2], alone)
