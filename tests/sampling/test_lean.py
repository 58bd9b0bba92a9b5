"""The lean decoder computes the logits of transformers, and its rows are filled with the next prompts."""

from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rlhf.sampling import LocalSampler, SamplingParams
from rlhf.sampling.decoding import lean_decoder
from rlhf.sampling.lean import LeanBatch
from rlhf.speed import speed

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
GPT2 = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
MAMBA2 = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "n_groups": 1,
}
LEAN = {
    "llama": LlamaConfig(**SIZES, num_attention_heads=4),
    "tied embeddings, grouped queries": LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True),
    "biases": LlamaConfig(**SIZES, **HEADS, attention_bias=True, mlp_bias=True),
    "another activation": LlamaConfig(**SIZES, **HEADS, hidden_act="gelu"),
    "llama3 positions": LlamaConfig(**SIZES, **HEADS, rope_parameters=LLAMA3),
    "linear positions": LlamaConfig(**SIZES, **HEADS, rope_parameters=LINEAR),
    "yarn positions": LlamaConfig(**SIZES, **HEADS, rope_parameters=YARN),
    "mistral": MistralConfig(**SIZES, **HEADS, sliding_window=None, head_dim=12),
    "qwen2": Qwen2Config(**SIZES, **HEADS),
    "qwen3": Qwen3Config(**SIZES, **HEADS, head_dim=12),
    "gpt2": GPT2Config(**GPT2),
    "gpt2, scaled by layer": GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False),
    "mamba2": Mamba2Config(**MAMBA2),
    "mamba2, another activation": Mamba2Config(**MAMBA2, hidden_act="gelu"),
    "mamba2, groups and biases": Mamba2Config(**{**MAMBA2, "n_groups": 2}, use_bias=True, chunk_size=4),
}
OTHERS = {
    "sliding window": MistralConfig(**SIZES, **HEADS, sliding_window=4),
    "layers with a window": Qwen2Config(
        **SIZES, **HEADS, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "positions that depend on the length": LlamaConfig(**SIZES, **HEADS, rope_parameters=DYNAMIC),
    "scaled logits": GraniteConfig(**SIZES, **HEADS),
    "cross-attention": GPT2Config(**GPT2, add_cross_attention=True),
    "limits of time steps": Mamba2Config(**MAMBA2, time_step_limit=(0.01, 0.1)),
    "mamba1": MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=8),
}
PROMPTS = [[1, 5, 260, 17, 3, 99, 41, 7, 20], [1, 30], [9], [1, 270, 281, 33, 12], [9], [4, 4, 4]]


class IdTokenizer:
    """A tokenizer that spells token 17 as ``"17"``; its EOS is never drawn."""

    eos_token_id = -1

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(300)}


def model(config: Any) -> PreTrainedModel:
    """A model whose tokens, positions and layers all matter."""
    torch.manual_seed(0)
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return lm


@torch.no_grad()
def plain_logits(lm: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """The next-token logits of transformers for each row alone, without a cache."""
    return torch.stack([lm(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1] for row in rows])


def decoder(lm: PreTrainedModel) -> type[LeanBatch]:
    found = lean_decoder(lm)
    assert found is not None
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", LEAN)
def test_logits_are_those_of_transformers(name: str) -> None:
    """For rows of different lengths, with equal prompts, after rows have left, and after a row was filled again."""
    lm, rows = model(LEAN[name]), [list(prompt) for prompt in PROMPTS]
    batch = decoder(lm)(lm, len(rows), 20)
    logits = batch.prefill(range(len(rows)), rows)
    assert_close(logits, plain_logits(lm, rows))

    def advance(rows: list[list[int]], logits: Tensor) -> Tensor:
        tokens = logits.argmax(dim=1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        logits = batch.decode(tokens)
        assert_close(logits, plain_logits(lm, rows))
        return logits

    logits = advance(rows, advance(rows, logits))
    order = batch.remove([0, 3])
    rows, logits = [rows[i] for i in order], logits[order]
    assert sorted(order) == [1, 2, 4, 5]
    logits = advance(rows, logits)
    rows[1] = [7, 8, 9, 10, 11, 12]
    logits[1] = batch.prefill([1], [rows[1]])[0]
    advance(rows, advance(rows, logits))


def greedy(lm: PreTrainedModel, prompts: list[list[int]], stop: int, **keys: int) -> list[list[int]]:
    sampler = LocalSampler(**keys)
    sampler.sync(lm, IdTokenizer())
    params = SamplingParams(max_new_tokens=9, temperature=0.0, stop_tokens=[str(stop)])
    return sampler.sample(prompts, params).response_ids()


@cache
def prompts_alone(name: str) -> tuple[list[list[int]], int, list[list[int]]]:
    """Return prompts, a stop token, and the response to each prompt alone, decoded by transformers."""
    lm = model(LEAN[name])
    torch.manual_seed(1)
    prompts = [torch.randint(300, (int(length),)).tolist() for length in torch.randint(1, 9, (30,))]
    with speed(lean_decoding=False):
        unlimited = [greedy(lm, [prompt], stop=299)[0] for prompt in prompts]
        stop = int(torch.tensor([token for response in unlimited for token in response]).bincount().argmax())
        return prompts, stop, [greedy(lm, [prompt], stop)[0] for prompt in prompts]


@pytest.mark.parametrize(("batch_size", "interval"), [(1, 3), (2, 1), (5, 3), (8, 50), (40, 1)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba2"])
def test_places_are_filled_with_the_next_prompts(name: str, batch_size: int, interval: int) -> None:
    """Responses of 1 to 9 tokens: each is the same as that of its prompt alone, decoded by transformers."""
    prompts, stop, expected = prompts_alone(name)
    assert len({len(response) for response in expected}) >= 4
    assert greedy(model(LEAN[name]), prompts, stop, batch_size=batch_size, stop_interval=interval) == expected


@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba2"])
def test_sampled_responses_do_not_depend_on_the_decoder(name: str, temperature: float) -> None:
    """With the same seed, they are the same, although rows leave the batch at different steps."""
    lm = model(LEAN[name])
    params = SamplingParams(max_new_tokens=12, temperature=temperature, stop_tokens=[str(t) for t in range(0, 300, 6)])
    responses = []
    for lean in (True, False):
        sampler = LocalSampler()
        sampler.sync(lm, IdTokenizer())
        torch.manual_seed(0)
        with speed(lean_decoding=lean):
            responses.append(sampler.sample(PROMPTS * 5, params).response_ids())
    assert len({len(response) for response in responses[0]}) >= 6
    assert responses[0] == responses[1]


def test_other_models_sample_in_chunks() -> None:
    """Five prompts, two at a time: three forward passes over prompts."""
    lm, sizes = model(OTHERS["scaled logits"]), []
    lm.register_forward_pre_hook(lambda module, args, keys: sizes.append(keys["input_ids"].shape), with_kwargs=True)
    found = greedy(lm, PROMPTS[:5], 299, batch_size=2)
    assert [shape[0] for shape in sizes if (shape[0] and shape[1] > 1) or len(sizes) == 1][:1] == [2]
    assert found == greedy(lm, PROMPTS[:5], 299)


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_decoded_by_transformers(name: str) -> None:
    assert lean_decoder(model(OTHERS[name])) is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba2"])
def test_models_in_half_precision_sample(name: str) -> None:
    """Under ``trainer.precision=bf16-true``. The residuals of Mamba-2 are float32 then, so transformers decodes it."""
    lm = model(LEAN[name]).bfloat16()
    assert (lean_decoder(lm) is None) == (name == "mamba2")
    responses = greedy(lm, PROMPTS, 299)
    assert responses[0][0] == int(plain_logits(lm, PROMPTS[:1]).argmax())


def test_the_switch() -> None:
    lm = model(LEAN["llama"])
    with speed(lean_decoding=False):
        assert lean_decoder(lm) is None


@torch.no_grad()
def test_equal_prompts_are_computed_once() -> None:
    """As GRPO samples them: four responses to each of two prompts."""
    lm, sizes = model(LEAN["llama"]), []
    rows = [[1, 2, 3]] * 4 + [[4, 5]] * 4
    batch, expected = decoder(lm)(lm, 8, 10), plain_logits(lm, rows)
    lm.base_model.register_forward_pre_hook(
        lambda module, args, keys: sizes.append(tuple(keys["inputs_embeds"].shape)), with_kwargs=True
    )
    assert_close(batch.prefill(range(8), rows), expected)
    assert sizes == [(2, 3, 32)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["wpe"]), ("mamba2", ["in_proj"])]
)
def test_adapters_are_part_of_the_logits(name: str, targets: list[str]) -> None:
    lm = model(LEAN[name])
    before = plain_logits(lm, [[1, 2, 3, 4]])
    inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), lm)
    batch = decoder(lm)(lm, 1, 10)
    batch.prefill([0], [[1, 2, 3]])
    found = batch.decode(torch.tensor([4]))
    assert_close(found, plain_logits(lm, [[1, 2, 3, 4]]))
    assert not torch.allclose(found, before, rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["tied embeddings, grouped queries", "gpt2", "mamba2"])
def test_logits_under_autocast(name: str, cached: bool) -> None:
    """They differ from those of transformers by the rounding of bfloat16, and not more than a float32 result does."""
    lm, row = model(LEAN[name]), [1, 5, 260, 17, 3]
    exact = plain_logits(lm, [row])
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
        batch = decoder(lm)(lm, 1, 10)
        batch.prefill([0], [row[:-1]])
        found, expected = batch.decode(torch.tensor(row[-1:])), plain_logits(lm, [row])
    assert found.dtype == torch.bfloat16
    rounding = float((expected.float() - exact).abs().max())
    assert 0 < float((found.float() - exact).abs().max()) <= 2 * rounding


def test_sampled_tokens_follow_the_distribution() -> None:
    """The second token of 4,000 responses to one prompt, 32 at a time: four standard errors."""
    lm = model(LlamaConfig(**{**SIZES, "vocab_size": 8}, num_attention_heads=4, eos_token_id=None))

    class Eight(IdTokenizer):
        def get_vocab(self) -> dict[str, int]:
            return {str(token): token for token in range(8)}

    sampler = LocalSampler(batch_size=32)
    sampler.sync(lm, Eight())
    torch.manual_seed(0)
    params = SamplingParams(max_new_tokens=2, temperature=1.0)
    seconds = [ids[1] for ids in sampler.sample([[1, 2]] * 4000, params).response_ids()]
    with torch.no_grad():
        first = lm(input_ids=torch.tensor([[1, 2]])).logits[0, -1].softmax(0)
        second = lm(input_ids=torch.tensor([[1, 2, token] for token in range(8)])).logits[:, -1].softmax(1)
    expected = first @ second
    found = torch.bincount(torch.tensor(seconds), minlength=8) / 4000
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt()).all()
