"""SamplingParams with a cache, in a padded batch from which rows leave, equals answering each prompt alone without one."""

from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconMambaConfig,
    GPT2Config,
    JambaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf.errors import UserError
from rlhf.models import Mamba, ModelSource, Transformer
from rlhf.sampling import Rollout, SamplingParams, generate

EOS = 2
PROMPTS = [[1, 5, 260, 17, 3, 99, 41, 7, 20], [1, 30], [9], [1, 270, 281, 33, 12]]
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


def gpt2() -> PreTrainedModel:
    """Learned embeddings of absolute places, where a left-padded prompt must still begin at place 0."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=EOS,
        initializer_range=0.5,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_config(name: str) -> PreTrainedConfig:
    """A configuration of a state-space model, or of a hybrid one with a Mamba layer and an attention layer."""
    common = dict(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=EOS,
        initializer_range=0.3,
    )
    attention = dict(intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
    if name == "mamba1":
        return MambaConfig(**common, state_size=8)
    if name == "falcon_mamba":
        return FalconMambaConfig(**common, state_size=8)
    if name == "jamba":
        return JambaConfig(
            **common,
            **attention,
            num_experts=1,
            num_experts_per_tok=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
            use_mamba_kernels=False,
        )
    return BambaConfig(
        **common,
        **attention,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_chunk_size=4,
    )


CONFIGURED = ("mamba1", "falcon_mamba", "jamba", "bamba")


@pytest.fixture(params=["transformer", "mamba", "gpt2", *CONFIGURED])
def architecture(request: pytest.FixtureRequest) -> str:
    """Rotary positions, a state (``mamba`` is Mamba-2), learned positions, Mamba-1, Falcon-Mamba, and two hybrids."""
    return request.param


@pytest.fixture
def source(architecture: str) -> ModelSource:
    if architecture == "mamba":
        return Mamba(hidden_size=32, num_layers=2, head_dim=16, state_size=8, chunk_size=4)
    return Transformer(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_length=128)


@pytest.fixture
def model(architecture: str, lm: PreTrainedModel) -> PreTrainedModel:
    """A tiny model with weights large enough for answers that depend on every token before them."""
    if architecture == "gpt2":
        return gpt2()
    if architecture in CONFIGURED:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config(architecture)).eval()
    with torch.no_grad():
        for weight in lm.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    return lm


@torch.no_grad()
def naive(lm: PreTrainedModel, prompt: list[int], count: int, stops: set[int]) -> list[int]:
    """Greedy answer to one prompt: the whole text through the model for every token, no cache, no padding."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(lm(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def frequent(lm: PreTrainedModel) -> int:
    """A token that some of the greedy answers contain before their end: as stop token it lets rows leave early."""
    answers = [naive(lm, prompt, 12, set()) for prompt in PROMPTS]
    inside = [token for answer in answers for token in answer[1:8]]
    return max(set(inside), key=lambda token: (sum(token in answer for answer in answers) % len(PROMPTS), token))


def test_a_padded_batch_equals_each_prompt_alone_without_cache(model: PreTrainedModel) -> None:
    """Prompts of 9, 2, 1 and 5 tokens, stopped by a token that ends some answers early."""
    stop = frequent(model)
    expected = [naive(model, prompt, 12, {stop}) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1  # rows do leave at different steps
    assert generate(model, PROMPTS, GREEDY, stop).response_ids() == expected
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        assert generate(model, [prompt], GREEDY, stop).response_ids() == [answer]


def test_only_attention_reads_the_mask_after_the_prompt(
    model: PreTrainedModel, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state-space model gets the mask with the prompts only; attention gets the mask of all tokens at every step."""
    widths: list[int | None] = []
    forward = model.forward

    @wraps(forward)
    def spy(**inputs: Any) -> Any:
        mask = inputs.get("attention_mask")
        widths.append(None if mask is None else mask.shape[1])
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", spy)
    generate(model, PROMPTS, SamplingParams(max_new_tokens=4, temperature=0.0), [])
    state_space = architecture in ("mamba", "mamba1", "falcon_mamba")
    assert widths == ([9, None, None, None] if state_space else [9, 10, 11, 12])


def test_the_order_of_the_prompts_is_the_order_of_the_answers(model: PreTrainedModel) -> None:
    """Also when rows leave the batch from its middle."""
    stop = frequent(model)
    forwards, backwards = (generate(model, prompts, GREEDY, stop) for prompts in (PROMPTS, PROMPTS[::-1]))
    assert backwards.response_ids() == forwards.answers()[::-1]
    assert backwards.finished.tolist() == forwards.finished.tolist()[::-1]


def test_a_rollout_by_its_tensors(model: PreTrainedModel) -> None:
    """Prompt, answer, padding on the right; masks and lengths agree; a stop token stands last or nowhere."""
    stop = frequent(model)
    rollout = generate(model, PROMPTS, GREEDY, stop)
    assert any(rollout.finished)
    assert rollout.attention_mask[:, 0].all()
    for i, (prompt, answer) in enumerate(zip(PROMPTS, rollout.response_ids(), strict=True)):
        whole = len(prompt) + len(answer)
        assert rollout.input_ids[i, :whole].tolist() == [*prompt, *answer]
        assert rollout.attention_mask[i].tolist() == [t < whole for t in range(rollout.input_ids.shape[1])]
        assert rollout.response_mask[i].tolist() == [
            len(prompt) <= t < whole for t in range(rollout.input_ids.shape[1])
        ]
        assert rollout.lengths[i] == len(answer)
        assert stop not in answer[:-1]
        assert rollout.finished[i] == (answer[-1] == stop)
        assert rollout.finished[i] or len(answer) == 12


def test_any_of_several_stop_tokens_ends_an_answer(model: PreTrainedModel) -> None:
    """The second and third token of the first answer as stops: it ends at whichever comes first."""
    free = naive(model, PROMPTS[0], 12, set())
    stops = [free[2], free[1]]
    rollout = generate(model, PROMPTS, GREEDY, stops)
    assert rollout.response_ids() == [naive(model, prompt, 12, set(stops)) for prompt in PROMPTS]
    assert rollout.finished[0]


def test_an_answer_is_cut_at_max_new_tokens_and_says_so(model: PreTrainedModel) -> None:
    """Three tokens, no stop among them: not finished."""
    rollout = generate(model, PROMPTS, SamplingParams(max_new_tokens=3, temperature=0.0), [])
    assert rollout.lengths.tolist() == [3, 3, 3, 3]
    assert not rollout.finished.any()


def test_stop_tokens_in_the_prompt_end_nothing(model: PreTrainedModel) -> None:
    """With pad = eos or in a long conversation EOS stands inside the prompt too: only the answer counts."""
    prompt = [EOS, 5, EOS, 17, EOS]
    rollout = generate(model, [prompt], SamplingParams(max_new_tokens=4, temperature=0.0), EOS)
    assert rollout.response_ids() == [naive(model, prompt, 4, {EOS})]
    assert rollout.response_mask[0].tolist()[:6] == [False] * 5 + [True]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_sampled_in_eval_and_given_back_as_it_was(training: bool) -> None:
    """Dropout 0.9 would turn greedy answers into noise."""
    lm = gpt2()
    expected = generate(lm, PROMPTS, GREEDY, EOS).response_ids()
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    assert generate(lm.train(training), PROMPTS, GREEDY, EOS).response_ids() == expected
    assert lm.training is training


def test_one_seed_one_answer(model: PreTrainedModel) -> None:
    """Drawn from torch's global generator: the same seed gives the same answers, another seed others."""

    def answers(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return generate(model, PROMPTS, replace(GREEDY, temperature=3.0), []).response_ids()

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)


def test_a_model_without_room_for_prompt_and_answer_is_refused() -> None:
    """32 places: 9 tokens of prompt leave room for 23, not for 24."""
    lm = gpt2()
    assert generate(lm, PROMPTS, SamplingParams(max_new_tokens=23, temperature=0.0), []).input_ids.shape == (4, 32)
    with pytest.raises(UserError, match=r"33 tokens, and the model reads 32\n.*stage\.\S*max_new_tokens"):
        generate(lm, PROMPTS, SamplingParams(max_new_tokens=24, temperature=0.0), [])


def test_rollout_lengths_and_answers_by_hand() -> None:
    """Row 0: prompt [5], answer [6, 2]; row 1: prompt [7, 8], answer [9], no EOS."""
    rollout = Rollout(
        tokens=torch.tensor([[5, 6, 2], [7, 8, 9]]),
        mask=torch.ones(2, 3, dtype=torch.bool),
        answer=torch.tensor([[False, True, True], [False, False, True]]),
        finished=torch.tensor([True, False]),
    )
    assert rollout.lengths.tolist() == [2, 1]
    assert rollout.response_ids() == [[6, 2], [9]]


PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])


def shares(sampling: SamplingParams, logits: Tensor, draws: int = 20_000) -> Tensor:
    torch.manual_seed(0)
    chosen = sampling.choose(logits.expand(draws, -1))
    return torch.bincount(chosen, minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingParams(), PROBABILITIES),
        # p ** (1 / T): squares over their sum, 0.25 + 0.0625 + 0.0225 + 0.0036 + 0.0016 = 0.3402
        (SamplingParams(temperature=0.5), PROBABILITIES.square() / 0.3402),
        # the two most likely of 0.75
        (SamplingParams(top_k=2), torch.tensor([2 / 3, 1 / 3, 0, 0, 0])),
        # 0.5 + 0.25 < 0.8 <= 0.5 + 0.25 + 0.15: three tokens hold it
        (SamplingParams(top_p=0.8), torch.tensor([5 / 9, 2.5 / 9, 1.5 / 9, 0, 0])),
        (SamplingParams(temperature=0.0), torch.tensor([1.0, 0, 0, 0, 0])),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "greedy"],
)
def test_draws_follow_the_distribution(sampling: SamplingParams, expected: Tensor) -> None:
    """20 000 draws: every share within four standard errors, sqrt(p (1 - p) / n); a share of 0 is exactly 0."""
    found = shares(sampling, PROBABILITIES.log()[None])
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / 20_000).sqrt() + 1e-7).all()


def test_rows_are_drawn_apart() -> None:
    """Two rows of even odds: each of the four pairs comes about a quarter of the time (four standard errors: 1.2 %)."""
    torch.manual_seed(0)
    pairs = SamplingParams().choose(torch.zeros(40_000, 2)).reshape(-1, 2)  # neighbours in the batch
    counts = torch.bincount(2 * pairs[:, 0] + pairs[:, 1], minlength=4) / 20_000
    assert (counts - 0.25).abs().max() < 0.0123


def kept(sampling: SamplingParams, logits: list[float]) -> list[int]:
    result = sampling.keep_likely(torch.tensor([logits]))[0]
    assert all(value in (logits[i], -torch.inf) for i, value in enumerate(result.tolist()))  # the others are untouched
    return torch.isfinite(result).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(0, [0, 1, 2, 3]), (1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])],
)
def test_top_k_keeps_the_k_most_likely(top_k: int, expected: list[int]) -> None:
    """Logits 2, -1, 3, 0: in falling order tokens 2, 0, 3, 1."""
    assert kept(SamplingParams(top_k=top_k), [2.0, -1.0, 3.0, 0.0]) == expected


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1.0, [0, 1, 2]), (0.95, [0, 1, 2]), (0.85, [0, 2]), (0.65, [0, 2]), (0.55, [2]), (0.01, [2])],
)
def test_top_p_keeps_the_fewest_tokens_that_hold_the_share(top_p: float, expected: list[int]) -> None:
    """Shares 0.3, 0.1, 0.6: token 2 holds 0.6, with token 0 it is 0.9, with token 1 all."""
    assert kept(SamplingParams(top_p=top_p), [float(torch.tensor(p).log()) for p in (0.3, 0.1, 0.6)]) == expected


def test_top_p_is_taken_of_what_top_k_left() -> None:
    """Shares 0.4, 0.35, 0.25; of the best two the first holds 0.4 / 0.75 = 0.53 >= 0.5, so it stays alone."""
    logits = [float(torch.tensor(p).log()) for p in (0.4, 0.35, 0.25)]
    assert kept(SamplingParams(top_k=2, top_p=0.5), logits) == [0]
    assert kept(SamplingParams(top_p=0.5), logits) == [0, 1]


@pytest.mark.parametrize(
    "keys", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_settings_that_make_no_sense_are_refused(keys: dict[str, float]) -> None:
    """The message names the key."""
    with pytest.raises(UserError, match=next(iter(keys))):
        SamplingParams(**keys)
