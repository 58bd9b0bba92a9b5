"""Tests that need an accelerator; run them with ``pytest -m gpu``."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from harness import run_train
from rlhf.models import ModelSource, Policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_log_probs_on_a_gpu_equal_those_on_the_cpu(source: ModelSource, tokenizer: PreTrainedTokenizerFast) -> None:
    """Both compute in float32. The GPU sums in another order, so the last digits may differ."""
    policy = Policy(source.language_model(tokenizer)).eval()
    input_ids = torch.randint(3, policy.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
    response_mask = attention_mask.clone()
    response_mask[:, :4] = False
    on_cpu = policy(input_ids, attention_mask, response_mask).logprobs
    on_gpu = policy.cuda()(input_ids.cuda(), attention_mask.cuda(), response_mask.cuda()).logprobs.cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_pipeline_runs_in_bfloat16(repo: Path, tmp_path: Path) -> None:
    """``trainer=gpu`` runs every stage for a few steps."""
    run_train(repo, tmp_path, "trainer=gpu", "trainer.max_steps=4", "data.max_rows=64", "model.hidden_size=64")
    assert (tmp_path / "rlhf" / "final_rl_model.pt").is_file()
