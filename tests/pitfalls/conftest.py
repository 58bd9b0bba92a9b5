"""What the regression tests of known pitfalls share."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

from pitfalls.runs import Runs, ends_often
from rlhf.models import Mamba, ModelSource, Transformer


@pytest.fixture
def runs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, lm: PreTrainedModel) -> Runs:
    """Runs of every stage, from a tiny model whose answers have different lengths."""
    return Runs(tmp_path, tokenizer, ends_often(lm, tokenizer.eos_token_id))


@pytest.fixture
def dropout_runs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Runs:
    """The same from a GPT-2 with dropout 0.1 everywhere."""
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
    return Runs(tmp_path, tokenizer, ends_often(lm, tokenizer.eos_token_id))


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, repo: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with what two processes of data-parallel runs left behind, for each architecture; see two_ranks.py."""
    folder = tmp_path_factory.mktemp("two_ranks")
    sources: dict[str, ModelSource] = {
        "transformer": Transformer(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_length=128),
        "mamba": Mamba(hidden_size=32, num_layers=2, head_dim=16, state_size=8, chunk_size=4),
    }
    for name, source in sources.items():
        torch.manual_seed(0)
        ends_often(source.language_model(tokenizer), tokenizer.eos_token_id).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(repo), str(repo / "tests")])
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("two_ranks.py")), str(folder)],
            env={**os.environ, **meeting, "LOCAL_RANK": str(rank), "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    return folder
