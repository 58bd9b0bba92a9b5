"""Tiny runs of the preference stage."""

from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from harness import TinyRun


@pytest.fixture
def tiny_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, lm: PreTrainedModel) -> TinyRun:
    """Trains tiny runs: 8 pairs in batches of 2 (KTO: 16 responses in batches of 4), with beta 0.1."""
    tiny_run = TinyRun(tmp_path, tokenizer, lm)
    tiny_run.stage_keys["dpo"] = {"beta": 0.1}
    tiny_run.stage_keys["kto"] = {"beta": 0.1}
    tiny_run.data_keys = {"batch_size": 2, "eval_batch_size": 3}
    return tiny_run
