"""Fixtures for the regression tests of known pitfalls."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from harness import FakeSource, TinyRun, make_eos_likely
from ranks import rank_environment, run_at_once
from rlhf.models import Mamba, ModelSource, Transformer


def one_minibatch(tiny_run: TinyRun) -> TinyRun:
    """PPO makes one pass over one minibatch, so that a run is one step in every stage."""
    tiny_run.stage_keys["ppo"] = {"minibatch_size": 8, "ppo_epochs": 1}
    return tiny_run


@pytest.fixture
def tiny_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, policy: FakeSource) -> TinyRun:
    """Runs of one step in every stage, from a tiny model whose responses have different lengths."""
    return one_minibatch(TinyRun(tmp_path, tokenizer, policy.model))


@pytest.fixture
def dropout_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> TinyRun:
    """The same from a GPT-2 with dropout 0.1 in every layer."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    lm = AutoModelForCausalLM.from_config(config).eval()
    return one_minibatch(TinyRun(tmp_path, tokenizer, make_eos_likely(lm, tokenizer.eos_token_id)))


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The directory that two processes of data-parallel runs write to, for each architecture; see two_ranks.py."""
    folder = tmp_path_factory.mktemp("two_ranks")
    sources: dict[str, ModelSource] = {
        "transformer": Transformer(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_length=128),
        "mamba": Mamba(hidden_size=32, num_layers=2, head_dim=16, state_size=8, chunk_size=4),
    }
    for name, source in sources.items():
        torch.manual_seed(0)
        make_eos_likely(source.language_model(tokenizer), tokenizer.eos_token_id).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    script = [str(Path(__file__).with_name("two_ranks.py")), str(folder)]
    outputs = run_at_once([script] * 2, [rank_environment(rank, 2) for rank in range(2)], timeout=180)
    assert [code for code, _ in outputs] == [0, 0], outputs
    return folder
