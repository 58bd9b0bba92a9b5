"""What only a machine with an accelerator can show; run with ``pytest -m gpu``."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf.models import ModelSource, Policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_gpu_gives_the_log_probs_of_the_cpu(source: ModelSource, tokenizer: object) -> None:
    """float32 on both; the GPU sums in another order, so the last digits may differ."""
    policy = Policy(source.language_model(tokenizer)).eval()
    tokens = torch.randint(3, policy.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    chosen = mask.clone()
    chosen[:, :4] = False
    on_cpu = policy(tokens, mask, chosen).logprobs
    on_gpu = policy.cuda()(tokens.cuda(), mask.cuda(), chosen.cuda()).logprobs.cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_pipeline_runs_in_bfloat16(repo: Path, tmp_path: Path) -> None:
    """``trainer=gpu``: all stages, a few steps each."""
    words = ["trainer=gpu", f"paths.root={tmp_path}", "trainer.max_steps=4", "data.max_rows=64", "model.hidden_size=64"]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "rlhf" / "final_rl_model.pt").is_file()
