"""Mixed precision and resuming in every stage, and on the command line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness import EXACT, STAGES, TinyRun

TINY = [
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.intermediate_size=32",
    "model.vocab_size=300",
    "data.max_rows=40",
    "trainer=cpu",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=1",
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_stage_clips_its_gradients(tiny_run: TinyRun, stage: str, precision: str) -> None:
    """Lightning cannot clip the gradients of a fused AdamW under mixed precision, so the stages do not use it there."""
    flags = {"precision": precision, "gradient_clip_val": 1e-3, "max_steps": 2, "max_epochs": 2}
    run = tiny_run.train(stage, trainer=flags)
    assert run.trainer.global_step == 2
    assert run.recorder.grad_norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


@pytest.fixture
def train(repo: Path, tmp_path: Path) -> Callable[..., None]:
    """Run ``python train.py`` with a tiny model; all output goes to a temporary directory."""

    def run(*overrides: str) -> None:
        command = [sys.executable, "train.py", *TINY, f"paths.root={tmp_path}", *overrides]
        done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.mark.slow
def test_bf16_mixed_trains_on_the_command_line(train: Callable[..., None], tmp_path: Path) -> None:
    train("stage=sft", "trainer.precision=bf16-mixed")
    assert (tmp_path / "rlhf" / "sft" / "sft_final.pt").is_file()


@pytest.mark.slow
def test_resuming_a_finished_reward_model_exports_the_same_file(train: Callable[..., None], tmp_path: Path) -> None:
    """With ``resume=true`` on a finished run, every weight and the stored mean score are equal bit for bit."""
    path = tmp_path / "rlhf" / "reward" / "reward_model_final.pt"
    train("stage=sft")
    train("stage=reward")
    first = torch.load(path, weights_only=True)["weights"]
    assert float(first["reward_mean"].abs()) > 1e-3
    path.unlink()
    train("stage=reward", "resume=true")
    second = torch.load(path, weights_only=True)["weights"]
    torch.testing.assert_close(second, first, **EXACT)
