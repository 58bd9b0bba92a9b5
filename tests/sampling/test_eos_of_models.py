"""Responses of models with several EOS tokens end where those of ``generate`` end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from harness import make_eos_likely
from rlhf import load_model
from rlhf.export import open_model_source, save_result
from rlhf.models import LoRA, ModelSource, Pretrained, WithAdapter
from rlhf.sampling import LocalSampler, Rollout, SamplingParams
from rlhf.speed import speed
from rlhf.stage import Result

EOS, END_OF_TURN = 2, 9
PROMPTS = [[1, 5, 260, 17, 3, 99], [1, 30], [1, 270, 281, 33, 12]]
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


@pytest.fixture
def pretrained(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Pretrained:
    """A folder of a model that often ends a turn with a token other than the EOS token of its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=300, initializer_range=0.2, bos_token_id=1, eos_token_id=EOS, **sizes)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        make_eos_likely(lm, END_OF_TURN)
    lm.generation_config = GenerationConfig(eos_token_id=[EOS, END_OF_TURN, 299999])
    lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return Pretrained(str(tmp_path / "base"))


def sample(lm: PreTrainedModel, tokenizer: Any, params: SamplingParams = GREEDY) -> Rollout:
    sampler = LocalSampler()
    sampler.sync(lm, tokenizer)
    return sampler.sample(PROMPTS, params)


def generated(lm: PreTrainedModel, prompts: Sequence[list[int]] = PROMPTS) -> list[list[int]]:
    """Return the greedy responses of ``generate``."""
    found = [
        lm.generate(torch.tensor([prompt]), max_new_tokens=GREEDY.max_new_tokens, do_sample=False)[0, len(prompt) :]
        for prompt in prompts
    ]
    return [response.tolist() for response in found]


@pytest.mark.parametrize("lean", [True, False])
def test_greedy_responses_are_those_of_generate(pretrained: Pretrained, lean: bool) -> None:
    """The cached decoder as well. Explicit stop tokens replace the EOS tokens of the model."""
    tokenizer = pretrained.tokenizer()
    lm = pretrained.language_model(tokenizer).eval()
    with speed(lean_decoding=lean):
        rollout = sample(lm, tokenizer)
        unlimited = sample(lm, tokenizer, SamplingParams(max_new_tokens=12, temperature=0.0, stop_tokens=["<eos>"]))
    assert rollout.response_ids() == generated(lm)
    assert set(rollout.stop_ids) == {EOS, END_OF_TURN}
    ended = [response[-1] == END_OF_TURN for response in rollout.response_ids()]
    assert any(ended)
    assert rollout.finished.tolist() == ended
    assert rollout.lengths[ended.index(True)] < unlimited.lengths[ended.index(True)]


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["complete", "adapter"])
def test_the_result_of_a_stage_stops_at_the_same_tokens(
    pretrained: Pretrained, tmp_path: Path, lora: LoRA | None
) -> None:
    """The tokenizer and the model are those of an export of an export, as in a later stage, evaluation and chat."""
    source: ModelSource = pretrained if lora is None else WithAdapter(pretrained, lora)
    for stage in ("sft", "dpo"):
        tokenizer = source.tokenizer(())
        path = tmp_path / f"{stage}_final.pt"
        save_result(Result(source.language_model(tokenizer), tokenizer), path, {})
        source = open_model_source(str(path))
    lm, tokenizer, _ = load_model(str(path), device="cpu")
    rollout = sample(lm, tokenizer)
    assert set(rollout.stop_ids) == {EOS, END_OF_TURN}
    assert rollout.response_ids() == generated(lm)
    assert rollout.finished.any()
