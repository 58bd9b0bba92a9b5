"""Frequencies of rotary positions under trainer.precision=bf16-true."""

import pytest
import torch
from models.pairs import LLAMA, model
from torch import nn

from rlhf.models import Policy, ScalarHead, ScalarModel


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_frequencies_stay_in_float32(kind: str) -> None:
    """The second of four frequencies, 10000 ** (-1 / 4) = 0.1, is 0.10009765625 in bfloat16."""
    lm = model(LLAMA)
    wrapped: nn.Module = Policy(lm) if kind == "policy" else ScalarModel(lm.base_model, ScalarHead(16))
    outer = nn.ModuleList([wrapped]).bfloat16()
    frequencies = lm.base_model.rotary_emb.inv_freq
    assert {parameter.dtype for parameter in outer.parameters()} == {torch.bfloat16}
    assert frequencies.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-6)
    assert outer.to("meta") is outer
    assert lm.base_model.rotary_emb.inv_freq.device.type == "meta"
