"""Smaller chunks of the Mamba-2 scan: the same states up to rounding."""

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from harness import TinyRun
from rlhf.models import limit_scan_chunks
from rlhf.speed import speed


def test_the_result_changes_by_rounding_only() -> None:
    config = Mamba2Config(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8, n_groups=2
    )
    torch.manual_seed(0)
    lm = Mamba2ForCausalLM(config)
    ids = torch.randint(40, (2, 100))
    expected = lm(input_ids=ids).logits
    gradient = torch.autograd.grad(expected.square().mean(), lm.parameters())
    with speed(scan_chunk=7):
        limit_scan_chunks(lm)
    assert {block.mixer.chunk_size for block in lm.backbone.layers} == {7}
    assert lm.config.chunk_size == 256
    found = lm(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().mean(), lm.parameters()), gradient, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("architecture", ["mamba"], indirect=True)
@pytest.mark.parametrize(("limit", "expected"), [(2, 2), (64, 4), (None, 4)])
def test_models_of_a_stage_are_limited(tiny_run: TinyRun, limit: int | None, expected: int) -> None:
    """The model specifies 4."""
    with speed(scan_chunk=limit):
        run = tiny_run.train("sft", trainer={"max_steps": 1})
    sizes = {part.chunk_size for part in run.module.modules() if hasattr(part, "chunk_size")}
    assert sizes == {expected}
