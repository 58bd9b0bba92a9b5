"""Sampling with a cache, from a padded batch that rows leave, equals sampling for each prompt alone without a cache."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconMambaConfig,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf.errors import ConfigError, UserError
from rlhf.models import Mamba, ModelSource, Transformer
from rlhf.sampling import LocalSampler, Rollout, SamplingParams
from rlhf.speed import speed

EOS = 2
PROMPTS = [[1, 5, 260, 17, 3, 99, 41, 7, 20], [1, 30], [9], [1, 270, 281, 33, 12]]
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


class IdTokenizer:
    """A tokenizer without EOS that spells token 17 as ``"17"``."""

    eos_token_id = -1

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(300)}


def sample(
    lm: PreTrainedModel, prompts: list[list[int]], params: SamplingParams = GREEDY, stop_ids: Sequence[int] = ()
) -> Rollout:
    """Sample responses that end with one of ``stop_ids``."""
    sampler = LocalSampler()
    sampler.sync(lm, IdTokenizer())
    return sampler.sample(prompts, replace(params, stop_tokens=[str(token) for token in stop_ids] or None))


def gpt2() -> PreTrainedModel:
    """A model with learned absolute positions: a left-padded prompt must still start at position 0."""
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
    """The config of a state-space model, or of a hybrid model with one Mamba layer and one attention layer."""
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
    """Rotary positions, Mamba-2 (``mamba``), learned positions, Mamba-1, Falcon-Mamba, and two hybrid models."""
    return request.param


@pytest.fixture
def source(architecture: str) -> ModelSource:
    if architecture == "mamba":
        return Mamba(hidden_size=32, num_layers=2, head_dim=16, state_size=8, chunk_size=4)
    return Transformer(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_length=128)


@pytest.fixture
def model(architecture: str, lm: PreTrainedModel) -> PreTrainedModel:
    """A tiny model with weights large enough that each token of a response depends on all tokens before it."""
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
def greedy_response(lm: PreTrainedModel, prompt: list[int], count: int, stops: set[int]) -> list[int]:
    """Greedy response to one prompt. Each step reads the whole sequence, without a cache and without padding."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(lm(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def early_stop_token(lm: PreTrainedModel) -> int:
    """A token inside some of the greedy responses: as a stop token, it makes rows leave the batch early."""
    responses = [greedy_response(lm, prompt, 12, set()) for prompt in PROMPTS]
    inside = [token for response in responses for token in response[1:8]]
    return max(set(inside), key=lambda token: (sum(token in r for r in responses) % len(PROMPTS), token))


def test_padded_batch_equals_single_prompts_without_cache(model: PreTrainedModel) -> None:
    """Prompts of 9, 2, 1 and 5 tokens; a stop token ends some responses early."""
    stop = early_stop_token(model)
    expected = [greedy_response(model, prompt, 12, {stop}) for prompt in PROMPTS]
    assert len({len(response) for response in expected}) > 1, "rows must leave the batch at different steps"
    assert sample(model, PROMPTS, stop_ids=[stop]).response_ids() == expected
    for prompt, response in zip(PROMPTS, expected, strict=True):
        assert sample(model, [prompt], stop_ids=[stop]).response_ids() == [response]


def test_attention_mask_per_decoding_step(
    model: PreTrainedModel, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state-space model gets a mask with the prompts only; attention gets the mask of all tokens at every step."""
    widths: list[int | None] = []
    forward = model.forward

    @wraps(forward)
    def spy(**inputs: Any) -> Any:
        mask = inputs.get("attention_mask")
        widths.append(None if mask is None else mask.shape[1])
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", spy)
    with speed(lean_decoding=False):
        sample(model, PROMPTS, SamplingParams(max_new_tokens=4, temperature=0.0))
    state_space = architecture in ("mamba", "mamba1", "falcon_mamba")
    assert widths == ([9, None, None, None] if state_space else [9, 10, 11, 12])


def test_responses_keep_the_order_of_the_prompts(model: PreTrainedModel) -> None:
    """The order is kept when rows leave the batch from its middle."""
    stop = early_stop_token(model)
    forwards, backwards = (sample(model, prompts, stop_ids=[stop]) for prompts in (PROMPTS, PROMPTS[::-1]))
    assert backwards.response_ids() == forwards.response_ids()[::-1]
    assert backwards.finished.tolist() == forwards.finished.tolist()[::-1]


def test_masks_and_lengths_of_a_rollout(model: PreTrainedModel) -> None:
    """A row is prompt, response, padding. A stop token occurs at the end of a response or not at all."""
    stop = early_stop_token(model)
    rollout = sample(model, PROMPTS, stop_ids=[stop])
    assert any(rollout.finished)
    assert rollout.attention_mask[:, 0].all()
    for i, (prompt, response) in enumerate(zip(PROMPTS, rollout.response_ids(), strict=True)):
        total = len(prompt) + len(response)
        columns = range(rollout.input_ids.shape[1])
        assert rollout.input_ids[i, :total].tolist() == [*prompt, *response]
        assert rollout.attention_mask[i].tolist() == [t < total for t in columns]
        assert rollout.response_mask[i].tolist() == [len(prompt) <= t < total for t in columns]
        assert rollout.lengths[i] == len(response)
        assert stop not in response[:-1]
        assert rollout.finished[i] == (response[-1] == stop)
        assert rollout.finished[i] or len(response) == 12


def test_each_of_several_stop_tokens_ends_a_response(model: PreTrainedModel) -> None:
    """With the second and third token of the first response as stop tokens, it ends at whichever comes first."""
    unstopped = greedy_response(model, PROMPTS[0], 12, set())
    stops = [unstopped[2], unstopped[1]]
    rollout = sample(model, PROMPTS, stop_ids=stops)
    assert rollout.response_ids() == [greedy_response(model, prompt, 12, set(stops)) for prompt in PROMPTS]
    assert rollout.finished[0]


def test_responses_without_stop_token_are_truncated(model: PreTrainedModel) -> None:
    """Three tokens without a stop token: the response is not finished."""
    rollout = sample(model, PROMPTS, SamplingParams(max_new_tokens=3, temperature=0.0))
    assert rollout.lengths.tolist() == [3, 3, 3, 3]
    assert not rollout.finished.any()


def test_stop_tokens_in_the_prompt_are_ignored(model: PreTrainedModel) -> None:
    """A prompt contains EOS if EOS is the padding token or if it is a conversation: only the response counts."""
    prompt = [EOS, 5, EOS, 17, EOS]
    rollout = sample(model, [prompt], SamplingParams(max_new_tokens=4, temperature=0.0), [EOS])
    assert rollout.response_ids() == [greedy_response(model, prompt, 4, {EOS})]
    assert rollout.response_mask[0].tolist()[:6] == [False] * 5 + [True]


@pytest.mark.parametrize("training", [True, False])
def test_model_is_sampled_in_eval_mode_and_restored(training: bool) -> None:
    """Dropout of 0.9 would change the greedy responses."""
    lm = gpt2()
    expected = sample(lm, PROMPTS, stop_ids=[EOS]).response_ids()
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    assert sample(lm.train(training), PROMPTS, stop_ids=[EOS]).response_ids() == expected
    assert lm.training is training


def test_same_seed_gives_same_responses(model: PreTrainedModel) -> None:
    """Responses are drawn from torch's global generator."""

    def responses(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return sample(model, PROMPTS, replace(GREEDY, temperature=3.0)).response_ids()

    assert responses(1) == responses(1)
    assert responses(1) != responses(2)


def test_sampler_reflects_weight_updates_after_sync(model: PreTrainedModel) -> None:
    """The sampler refers to the training model, so an optimizer step changes the next responses."""
    sampler = LocalSampler()
    sampler.sync(model, IdTokenizer())
    before = sampler.sample(PROMPTS, GREEDY).response_ids()
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()
    sampler.sync(model, IdTokenizer())
    after = sampler.sample(PROMPTS, GREEDY).response_ids()
    assert after == [greedy_response(model, prompt, 12, set()) for prompt in PROMPTS]
    assert after != before


def test_the_stop_interval_does_not_change_responses(model: PreTrainedModel) -> None:
    """Rows that continue after their stop token are cut there, and the others do not see them."""
    stop = early_stop_token(model)
    expected = [greedy_response(model, prompt, 12, {stop}) for prompt in PROMPTS]
    for interval in (1, 2, 3, 8, 50):
        sampler = LocalSampler(stop_interval=interval)
        sampler.sync(model, IdTokenizer())
        rollout = sampler.sample(PROMPTS, replace(GREEDY, stop_tokens=[str(stop)]))
        assert rollout.response_ids() == expected, interval
        assert rollout.finished.tolist() == [response[-1] == stop for response in expected], interval


def test_stop_interval_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"^stage\.sampler\.stop_interval must be an integer of at least 1 or null"):
        LocalSampler(stop_interval=0)


class RowRecorder:
    """Records the number of rows of each forward pass."""

    def __init__(self, lm: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        forward = lm.forward

        @wraps(forward)
        def spy(**inputs: Any) -> Any:
            self.rows.append(len(inputs["input_ids"]))
            return forward(**inputs)

        monkeypatch.setattr(lm, "forward", spy)


def test_finished_rows_leave_the_batch_at_the_stop_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """With interval 3, the number of rows changes after steps 3, 6, ... only, and it is the number of unfinished
    responses. null is 1 on the CPU.
    """
    lm = gpt2()
    stop = early_stop_token(lm)
    lengths = [len(greedy_response(lm, prompt, 12, {stop})) for prompt in PROMPTS]
    for interval in (None, 3):
        with monkeypatch.context() as context:
            recorder = RowRecorder(lm, context)
            sampler = LocalSampler(stop_interval=interval)
            sampler.sync(lm, IdTokenizer())
            with speed(lean_decoding=False):
                sampler.sample(PROMPTS, replace(GREEDY, stop_tokens=[str(stop)]))
        seen = [step - step % (interval or 1) for step in range(12)]
        expected = [sum(length > step for length in lengths) if step else len(PROMPTS) for step in seen]
        assert recorder.rows == [rows for rows in expected if rows]


def test_prompts_of_equal_length_are_sampled_together_if_padding_would_reach_the_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts of 9, 2, 1, 5, 2 and 2 tokens, two at a time: the longest one is first, and no batch is padded."""
    config = tiny_config("mamba1")
    config.use_bias = True
    lm = AutoModelForCausalLM.from_config(config).eval()
    for layer in lm.backbone.layers:
        torch.nn.init.normal_(layer.mixer.in_proj.bias)
    prompts = [*PROMPTS, [7, 8], [3, 4]]
    expected = [greedy_response(lm, prompt, 12, set()) for prompt in prompts]
    recorder = RowRecorder(lm, monkeypatch)
    sampler = LocalSampler(batch_size=2)
    sampler.sync(lm, IdTokenizer())
    assert sampler.sample(prompts, GREEDY).response_ids() == expected
    assert recorder.rows == [rows for rows in (1, 1, 2, 1, 1) for _ in range(12)]


class HostReads(TorchDispatchMode):
    """Counts operators that make the host wait for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.count += name in self.NAMES
        if name in ("index", "index_put", "index_put_"):
            self.count += any(index is not None and index.dtype == torch.bool for index in args[1])
        return function(*args, **(kwargs or {}))


def test_the_host_waits_for_the_device_once_per_stop_interval(model: PreTrainedModel) -> None:
    """64 prompts of different lengths, 23 tokens, interval 8: two reads of the stop flags, and up to three of the
    attention mask, which transformers makes for the prompts only. With 64 tokens, that is 0.16 per step.
    """
    sampler = LocalSampler(stop_interval=8)
    sampler.sync(model, IdTokenizer())
    with HostReads() as reads:
        rollout = sampler.sample(PROMPTS * 16, SamplingParams(max_new_tokens=23, temperature=1.0))
        rollout.response_ids()
    assert 2 <= reads.count <= 2 + 3


def test_tokens_that_the_tokenizer_does_not_have_are_never_drawn() -> None:
    """A model with 300 embeddings and a tokenizer of 300 tokens minus 200: the padding is not sampled."""

    class ShortTokenizer(IdTokenizer):
        def get_vocab(self) -> dict[str, int]:
            return {str(token): token for token in range(100)}

    lm = gpt2()
    sampler = LocalSampler()
    for temperature in (0.0, 5.0):
        params = SamplingParams(max_new_tokens=12, temperature=temperature)
        sampler.sync(lm, ShortTokenizer())
        short = sampler.sample([[1, 5]] * 20, params).response_ids()
        sampler.sync(lm, IdTokenizer())
        full = sampler.sample([[1, 5]] * 20, params).response_ids()
        assert max(map(max, short)) < 100 <= max(map(max, full))


def test_logits_that_are_not_finite_are_an_error() -> None:
    """It names what to look at. Such logits after the end of a response do not matter."""
    lm = gpt2()
    stop = greedy_response(lm, [1, 5], 1, set())[0]
    with torch.no_grad():
        lm.transformer.wpe.weight[4] = torch.nan  # The token at position 5 is the fourth one of a response.
    assert sample(lm, [[1, 5]], replace(GREEDY, max_new_tokens=3)).lengths.tolist() == [3]
    with pytest.raises(UserError, match=r"NaN or infinite at token 4 of a response.*\n.*grad_norm"):
        sample(lm, [[1, 5]], GREEDY)
    sampler = LocalSampler(stop_interval=8)
    sampler.sync(lm, IdTokenizer())
    assert sampler.sample([[1, 5]], replace(GREEDY, stop_tokens=[str(stop)])).response_ids() == [[stop]]


def test_sampling_before_sync_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="sync"):
        LocalSampler().sample(PROMPTS, GREEDY)


def test_too_few_positions_are_refused() -> None:
    """With 32 positions, a prompt of 9 tokens leaves 23 for the response, not 24."""
    lm = gpt2()
    assert sample(lm, PROMPTS, SamplingParams(max_new_tokens=23, temperature=0.0)).input_ids.shape == (4, 32)
    with pytest.raises(ConfigError, match=r"need 33 positions together, but the model has 32\.\n.*max_new_tokens"):
        sample(lm, PROMPTS, SamplingParams(max_new_tokens=24, temperature=0.0))


def test_positions_that_may_change_give_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """LongRoPE has other frequencies above 6 tokens."""
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 6, "factor": 4.0, "rope_theta": 100.0}
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    lm = AutoModelForCausalLM.from_config(
        LlamaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=24, rope_parameters={**rope, **factors})
    )
    params = SamplingParams(max_new_tokens=3, temperature=0.0)
    sample(lm, [[1, 5, 7]], params)
    sample(lm, [[1] * 7], params)
    assert not caplog.records
    for _ in range(2):
        sample(lm, [[1, 5, 7, 9]], params)
    assert [record.message.split(".")[0] for record in caplog.records] == [
        "The model encodes positions of sequences of more than 6 tokens differently (rope_type=longrope)"
    ]


def streamed(sampler: LocalSampler, prompt: list[int], params: SamplingParams, seed: int) -> Iterator[int]:
    """Stream a response with a generator of the given seed."""
    return sampler.stream(prompt, params, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("interval", [1, 3])
def test_streamed_tokens_equal_those_of_sample(model: PreTrainedModel, interval: int) -> None:
    """With one seed, at temperature 2: a response that ends at its sixth token, and one of 12 tokens."""
    params = SamplingParams(max_new_tokens=12, temperature=2.0, top_k=50)
    sampler = LocalSampler(stop_interval=interval)
    sampler.sync(model, IdTokenizer())
    torch.manual_seed(3)
    (unlimited,) = sampler.sample(PROMPTS[:1], params).response_ids()
    assert unlimited[5] not in unlimited[:5]
    stopping = replace(params, stop_tokens=[str(unlimited[5])])
    assert list(streamed(sampler, PROMPTS[0], params, seed=3)) == unlimited
    assert list(streamed(sampler, PROMPTS[0], stopping, seed=3)) == unlimited[:6]


def test_streams_take_turns_without_changing_each_other(model: PreTrainedModel) -> None:
    """Two streams with separate generators; the global random state and the mode of the model stay as they are."""
    params = SamplingParams(max_new_tokens=8, temperature=2.0)
    sampler = LocalSampler()
    sampler.sync(model.train(), IdTokenizer())
    alone = [list(streamed(sampler, prompt, params, seed)) for prompt, seed in zip(PROMPTS, (1, 2), strict=False)]
    state = torch.get_rng_state()
    first, second = (streamed(sampler, prompt, params, seed) for prompt, seed in zip(PROMPTS, (1, 2), strict=False))
    turns: list[list[int]] = [[], []]
    for token, other in zip(first, second, strict=True):
        assert model.training, "between two steps, the model is in the mode in which it was"
        turns[0].append(token)
        turns[1].append(other)
    assert turns == alone
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_that_are_not_finite_end_a_stream() -> None:
    lm = gpt2()
    with torch.no_grad():
        lm.transformer.wpe.weight[4] = torch.nan  # The token at position 5 is the fourth one of a response.
    sampler = LocalSampler()
    sampler.sync(lm, IdTokenizer())
    stream = streamed(sampler, [1, 5], GREEDY, seed=0)
    assert len([next(stream) for _ in range(3)]) == 3
    with pytest.raises(UserError, match="NaN or infinite at token 4 of a response"):
        next(stream)
