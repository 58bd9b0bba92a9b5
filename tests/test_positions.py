"""Models with fewer positions than the sequences of a stage need."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from harness import PROMPTS, STAGES, TinyRun
from rlhf.models import Transformer
from rlhf.sampling import LocalSampler, Rollout, SamplingParams
from rlhf.stage.sample_table import _warn_of_positions


@pytest.fixture(scope="session")
def architecture() -> str:
    """State-space models have no positions."""
    return "transformer"


def run_with_positions(folder: Path, tokenizer: PreTrainedTokenizerFast, positions: int) -> TinyRun:
    """Return runs of a model with rotary positions, which can be trained on longer sequences than it samples."""
    torch.manual_seed(0)
    source = Transformer(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_length=positions)
    return TinyRun(folder, tokenizer, source.language_model(tokenizer))


class RecordingSampler(LocalSampler):
    """Records the lengths of the prompts and the maximum length of responses of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[int], int]] = []

    def sample(self, prompts: Any, params: SamplingParams) -> Rollout:
        self.calls.append((list(map(len, prompts)), params.max_new_tokens))
        return super().sample(prompts, params)


# Tables of samples


@pytest.mark.parametrize(
    ("positions", "wanted", "lengths"),
    [
        (64, 60, ([64 - 32], 32)),  # Prompt and response get one half each.
        (64, 20, ([64 - 20], 20)),  # The prompt is shortened: it gets what the response leaves.
        (128, 60, ([96 - 48], 60)),  # The data allow 96 tokens, of which the response gets at most one half.
    ],
)
@pytest.mark.parametrize("stage", ["sft", "dpo", "kto"])
def test_a_table_of_samples_fits_the_positions(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    stage: str,
    positions: int,
    wanted: int,
    lengths: tuple[list[int], int],
) -> None:
    """A prompt of more than 96 tokens is trained on, and it is in the table after training."""
    short = run_with_positions(tmp_path, tokenizer, positions)
    _warn_of_positions.cache_clear()  # It warns once per process.
    prompt = " ".join(PROMPTS) * 4
    rows = [{**STAGES[stage].records[0], "prompt": prompt}, *STAGES[stage].records[1:]]
    val, sampler = short.write("val", rows), RecordingSampler()
    with caplog.at_level(logging.WARNING, "rlhf.stage.sample_table"):
        run = short.train(stage, data={"val": val}, samples=1, max_new_tokens=wanted, sampler=sampler)
    assert run.trainer.global_step == (2 if stage == "kto" else 1)  # A pair is two rows of KTO.
    assert sampler.calls == [lengths]
    warnings = [message for message in caplog.messages if message.startswith("Responses in the table of samples")]
    shortened = "at most 32 tokens instead of stage.max_new_tokens=60: the model has 64 positions"
    assert [shortened in message for message in warnings] == ([True] if lengths[1] < wanted else [])
