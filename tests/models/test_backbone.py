"""Log-probs equal those of the plain transformers model and do not depend on padding or other rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedModel,
    modeling_utils,
)

from rlhf.models import Policy, PolicyOutput, ScalarHead, ScalarModel, hidden_states, kl_divergence, logits

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


def evaluate(lm: PreTrainedModel, *args: Tensor, **keys: float) -> PolicyOutput:
    """Log-probs, entropy and argmax of a policy."""
    return Policy(lm)(*args, entropy="value", is_argmax=True, **keys)


def test_logprobs_entropy_and_argmax_equal_those_of_the_plain_model(lm: PreTrainedModel) -> None:
    """log p(token t) is the log_softmax of the plain logits at t - 1, and entropy = -sum p log p."""
    tokens = torch.cat([ROW, ROW.flip(1)])
    with torch.no_grad():
        expected = lm(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)
    tokens[0, 3] = expected[0, 2].argmax()  # at least one token is the most likely one
    with torch.no_grad():
        expected = lm(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)

    mask, chosen = full_masks(tokens)
    scores = evaluate(lm, tokens, mask, chosen)

    picked = expected.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(scores.logprobs[:, 1:].detach(), picked)
    torch.testing.assert_close(scores.entropy[:, 1:], -(expected.exp() * expected).sum(dim=-1))
    assert torch.equal(scores.is_argmax[:, 1:], expected.argmax(dim=-1) == tokens[:, 1:])
    assert scores.is_argmax[0, 3]
    assert not scores.entropy.requires_grad


def test_entropy_and_argmax_are_computed_on_request(lm: PreTrainedModel) -> None:
    """By default there are only log-probs. With ``entropy="grad"``, the entropy has a gradient."""
    mask, chosen = full_masks(ROW)
    plain = Policy(lm)(ROW, mask, chosen)
    assert (plain.entropy, plain.is_argmax) == (None, None)
    without, with_gradient = (Policy(lm)(ROW, mask, chosen, entropy=mode).entropy for mode in ("value", "grad"))
    torch.testing.assert_close(with_gradient.detach(), without)
    assert with_gradient.requires_grad
    assert not without.requires_grad


def test_outputs_outside_the_response_are_zero(lm: PreTrainedModel) -> None:
    """The response consists of tokens 4 to 6: 3 log-probs below 0, and 0 everywhere else."""
    mask, chosen = full_masks(ROW)
    chosen[:, :4] = False
    scores = evaluate(lm, ROW, mask, chosen)
    assert (scores.logprobs != 0).tolist() == chosen.tolist()
    assert (scores.entropy != 0).tolist() == chosen.tolist()


@pytest.mark.parametrize(("left", "right"), [(0, 3), (3, 0), (2, 5)])
@pytest.mark.parametrize("token", [0, 2, 77])  # padding token, EOS, a word
def test_padding_does_not_change_outputs(lm: PreTrainedModel, left: int, right: int, token: int) -> None:
    """The same row alone and with padding on either side, of any length and of any token, including EOS."""
    alone = evaluate(lm, ROW, *full_masks(ROW))
    tokens, mask, chosen = padded(ROW, left, right, lambda count: torch.full((count,), token))
    surrounded = evaluate(lm, tokens, mask, chosen)
    positions = slice(left, left + ROW.shape[1])
    torch.testing.assert_close(surrounded.logprobs[:, positions], alone.logprobs)
    torch.testing.assert_close(surrounded.entropy[:, positions], alone.entropy)
    torch.testing.assert_close(surrounded.states, alone.states)


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
    scores = evaluate(lm, ROW, *full_masks(ROW), temperature=0.5)
    torch.testing.assert_close(scores.logprobs[:, 1:].detach(), expected.gather(-1, ROW[:, 1:, None])[..., 0])
    torch.testing.assert_close(scores.entropy[:, 1:], -(expected.exp() * expected).sum(dim=-1))


def outputs_and_gradients(lm: PreTrainedModel) -> list[Tensor]:
    """Outputs for 12 tokens with the KL to another model, and the gradients of their sum."""
    torch.manual_seed(3)
    reference = Policy(type(lm)(lm.config).eval())
    tokens = torch.cat([ROW, ROW.flip(1)])
    mask, chosen = full_masks(tokens)
    policy = Policy(lm)
    lm.zero_grad()
    output = policy(tokens, mask, chosen, 0.7, entropy="grad", is_argmax=True)
    with torch.no_grad():
        ref_states = reference(tokens, mask, chosen, 0.7).states
    kl = kl_divergence(policy, output.states, reference, ref_states, chosen, 0.7)
    (output.logprobs.sum() + 2 * output.entropy.sum() + 3 * kl.sum()).backward()
    gradients = [parameter.grad for parameter in lm.parameters()]
    return [output.logprobs.detach(), output.entropy.detach(), output.is_argmax, kl.detach(), *gradients]


def test_chunks_change_neither_outputs_nor_gradients(lm: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 tokens in chunks of 5, 5 and 2, whose logits the backward pass computes again."""
    expected = outputs_and_gradients(lm)
    monkeypatch.setattr(logits, "LOGIT_CHUNK_BYTES", 5 * 4 * 300)
    for value, other in zip(outputs_and_gradients(lm), expected, strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize(("tokens", "expected"), [(8, [8]), (9, [2, 2, 2, 2, 1])])
def test_larger_logits_are_computed_in_smaller_chunks(
    tokens: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of 8 tokens are computed at once. With more tokens, chunks have 2 of them on a CPU."""
    monkeypatch.setattr(logits, "LOGIT_CHUNK_BYTES", 8 * 4 * 300)
    monkeypatch.setattr(logits, "CPU_CHUNK_BYTES", 2 * 4 * 300)
    chunks: list[int] = []

    def double(values: Tensor) -> tuple[Tensor]:
        chunks.append(len(values))
        return (2 * values,)

    (doubled,) = logits.in_chunks(double, (torch.arange(tokens),), 300)
    assert chunks == expected
    assert doubled.tolist() == [2 * i for i in range(tokens)]


def stored_logits(lm: PreTrainedModel) -> int:
    """Return the number of distributions over the vocabulary that the forward pass stores for the backward pass."""
    stored = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal stored
        stored += tensor.numel() // 300 if tensor.shape[-1:] == (300,) and tensor.shape[0] != 32 else 0
        return tensor

    tokens = torch.cat([ROW, ROW.flip(1)])
    mask, chosen = full_masks(tokens)
    policy, reference = Policy(lm), Policy(type(lm)(lm.config).eval())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = policy(tokens, mask, chosen, entropy="grad", is_argmax=True)
        kl_divergence(policy, output.states, reference, output.states.detach(), chosen)
    return stored


def test_logits_in_several_chunks_are_not_stored(lm: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded in bytes: with a vocabulary of 300, 6000 bytes are the float32 logits of 5 tokens.

    A single chunk of 12 tokens is stored, so that small batches are not computed twice.
    """
    assert stored_logits(lm) >= 24
    monkeypatch.setattr(logits, "LOGIT_CHUNK_BYTES", 6000)
    assert stored_logits(lm) == 0


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
    """The transform is found when the policy is built, while the logits are still too small for the cap to matter.

    After that, the output embedding grows by the factor ``growth``, as it might in training.
    """
    lm, tokens = special_heads()[name], ROW % 60
    policy = Policy(lm)
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(growth)
        expected = lm(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
    scores = policy(tokens, *full_masks(tokens))
    torch.testing.assert_close(scores.logprobs[:, 1:].detach(), expected)
    scores.logprobs.sum().backward()
    assert all(parameter.grad is not None for parameter in lm.parameters())


def test_a_model_with_nan_weights_is_not_called_unsupported(lm: PreTrainedModel) -> None:
    """It has diverged. Sampling and the loss report that."""
    with torch.no_grad():
        next(lm.base_model.parameters()).fill_(torch.nan)
    assert Policy(lm)(ROW, *full_masks(ROW)).logprobs[:, 1:].isnan().all()


def test_forward_calls_each_module_of_the_model_as_it_is() -> None:
    """No module is replaced or copied, even for a head that caps the logits, so sharding and compilation work."""
    lm, tokens, called = special_heads()["capped"], ROW % 60, []
    policy = Policy(lm)
    lm.base_model.register_forward_hook(lambda *args: called.append(args[0]))
    lm.get_output_embeddings().register_forward_hook(lambda *args: called.append(args[0]))
    policy(tokens, *full_masks(tokens))
    assert called == [lm.base_model, lm.get_output_embeddings()]


def test_the_head_has_a_gradient_in_the_first_step_under_autocast(lm: PreTrainedModel) -> None:
    """The first pass uses the output embedding once, with gradients. A probe under ``no_grad`` in the same autocast
    context would leave a copy without gradient in the cache of autocast (pytorch#165068, fixed in torch 2.11).

    Logits, log-probs and entropy are float32.
    """
    policy, grad_enabled = Policy(lm), []
    lm.get_output_embeddings().register_forward_hook(lambda *args: grad_enabled.append(torch.is_grad_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        output = policy(ROW, *full_masks(ROW), entropy="grad")
        assert policy.logits(output.states).dtype == torch.float32
    assert (output.logprobs.dtype, output.entropy.dtype) == (torch.float32, torch.float32)
    assert grad_enabled == [True, True]
    output.logprobs.sum().backward()
    assert lm.get_output_embeddings().weight.grad.abs().sum() > 0


class HostReads(torch.overrides.TorchFunctionMode):
    """Counts the calls for which the host waits for the device, on the CPU as a stand-in.

    Operations whose result has a shape that depends on values, conversions to Python numbers, and copies to the CPU.
    """

    NAMES = frozenset({"item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu", "masked_select"})

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        indices = args[1] if name == "__getitem__" else ()
        masks = [i for i in (indices if isinstance(indices, tuple) else (indices,)) if isinstance(i, Tensor)]
        if name in self.NAMES or any(i.dtype == torch.bool for i in masks):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("response_tokens", "own_reads"), [(None, ["nonzero"]), (6, [])])
def test_the_host_reads_the_device_only_to_count(
    lm: PreTrainedModel, response_tokens: int | None, own_reads: list[str]
) -> None:
    """A policy reads where the response tokens are, unless it is told how many there are.

    Further reads are those of transformers in the trunk and, on the CPU only, two that find out whether rows are
    padded on the left and how long they are.
    """
    policy = Policy(lm)
    with HostReads() as reads_of_trunk:
        lm.base_model(input_ids=ROW, use_cache=False)
    masks = full_masks(ROW)
    with HostReads() as reads:
        policy(ROW, *masks, entropy="value", is_argmax=True, response_tokens=response_tokens)
    assert sorted(reads.names) == sorted([*own_reads, "__bool__", "tolist", *reads_of_trunk.names])


def test_the_number_of_response_tokens_changes_nothing(lm: PreTrainedModel) -> None:
    """The outputs have the same bits, with responses of 3, 0 and 6 tokens."""
    tokens = torch.cat([ROW, ROW.flip(1), ROW])
    mask, chosen = full_masks(tokens)
    chosen[0, :4] = False
    chosen[1] = False
    found, expected = (Policy(lm)(tokens, mask, chosen, response_tokens=count) for count in (9, None))
    assert torch.equal(found.logprobs, expected.logprobs)
    assert torch.equal(found.states, expected.states)


def test_padding_tokens_cause_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called without an attention mask, GPT-2 would warn of padding tokens, although they have no effect here."""
    warnings: list[str] = []
    monkeypatch.setattr(modeling_utils.logger, "warning_once", warnings.append)
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)
    tokens, mask, chosen = padded(ROW, 0, 2, lambda count: torch.zeros(count, dtype=torch.long))
    policy, trunk = (
        Policy(AutoModelForCausalLM.from_config(config)),
        AutoModelForCausalLM.from_config(config).base_model,
    )
    policy(tokens, mask, chosen)
    ScalarModel(trunk, ScalarHead(16))(tokens, mask)
    assert warnings == []


def test_positions_count_from_the_first_real_token() -> None:
    """GPT-2 has absolute position embeddings, so a left-padded row must start at position 0."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    trunk = AutoModelForCausalLM.from_config(config).eval().base_model
    alone = trunk(input_ids=ROW).last_hidden_state[0]
    tokens, mask, _ = padded(ROW, 4, 2, lambda count: torch.full((count,), 9))
    positions = (torch.zeros(7, dtype=torch.long), torch.arange(4, 11))
    torch.testing.assert_close(hidden_states(trunk, tokens, mask, positions), alone)
