"""Precision and resuming, in every stage and as a user types them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hydra.utils import instantiate
from transformers import PreTrainedTokenizerFast

from helpers import ANSWERS, PROMPTS, Fixed
from test_configs import composed

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
STAGE_KEYS = {
    "sft": ["stage.samples=0"],
    "reward": ["data.demonstrations=null"],
    "ppo": ["stage.sampling.max_new_tokens=8", "stage.minibatch_size=4", "stage.ppo_epochs=1"],
    "dpo": ["stage.ref_logprobs_cache=null"],
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Two batches of each kind of record."""
    rows: dict[str, list[dict[str, str]]] = {
        "sft": [{"prompt": prompt, "completion": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=False)],
        "ppo": [{"prompt": prompt} for prompt in PROMPTS],
        "dpo": [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for prompt, chosen, rejected in zip(PROMPTS, ANSWERS, ANSWERS[1:], strict=False)
        ],
    }
    paths = {}
    for name, records in rows.items():
        paths[name] = str(tmp_path / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in records))
    return {**paths, "reward": paths["dpo"]}


@pytest.mark.parametrize("stage", STAGE_KEYS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_stage_clips_its_gradients(
    stage: str, precision: str, files: dict[str, str], tokenizer: PreTrainedTokenizerFast, policy: Fixed, judge: Fixed
) -> None:
    """Two steps in Lightning's own loop, with the clipping that ``conf/trainer`` sets."""
    cfg = composed(
        f"stage={stage}",
        "data=jsonl",
        *STAGE_KEYS[stage],
        "data.batch_size=4",
        "data.max_length=64",
        "data.val_fraction=0",
        "trainer=cpu",
        f"trainer.precision={precision}",
        "trainer.gradient_clip_val=1e-3",
        "trainer.max_steps=2",
        "trainer.max_epochs=2",
        "stage.learning_rate=1e-3",
        "stage.schedule=constant",
    )
    parents = {"policy": policy, **({"reward_model": judge} if stage == "ppo" else {})}
    extra = {"output": None} if "output" in cfg.stage else {}
    module, data = instantiate(cfg.stage, _partial_=True)(**parents, **extra), instantiate(cfg.data, train=files[stage])
    module.tokenizer = data.tokenizer = tokenizer
    norms = Norms()
    lightning.seed_everything(7, verbose=False)
    trainer = instantiate(
        cfg.trainer, callbacks=[norms], logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, data)
    assert trainer.global_step == 2
    assert norms.used == pytest.approx([1e-3, 1e-3], rel=1e-2)


class Norms(lightning.Callback):
    """Keeps the norm of the gradient that each optimizer step uses."""

    def __init__(self) -> None:
        self.used: list[float] = []

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(self.note)

    def note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.used.append(float(torch.nn.utils.get_total_norm(gradients)))


@pytest.fixture
def train(repo: Path, tmp_path: Path) -> Callable[..., None]:
    """Runs ``python train.py`` on a tiny model, with everything written under a temporary folder."""

    def run(*typed: str) -> None:
        command = [sys.executable, "train.py", *TINY, f"paths.root={tmp_path}", *typed]
        done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.mark.slow
def test_bf16_mixed_can_be_typed(train: Callable[..., None], tmp_path: Path) -> None:
    train("stage=sft", "trainer.precision=bf16-mixed")
    assert (tmp_path / "rlhf" / "sft" / "sft_final.pt").is_file()


@pytest.mark.slow
def test_a_finished_reward_model_is_exported_again_as_it_was(train: Callable[..., None], tmp_path: Path) -> None:
    """``resume=true`` on a finished run: every weight and the stored mean are equal to the last bit."""
    path = tmp_path / "rlhf" / "reward" / "reward_model_final.pt"
    train("stage=sft")
    train("stage=reward")
    first = torch.load(path, weights_only=True)["weights"]
    assert float(first["reward_mean"].abs()) > 1e-3
    path.unlink()
    train("stage=reward", "resume=true")
    second = torch.load(path, weights_only=True)["weights"]
    torch.testing.assert_close(second, first, rtol=0.0, atol=0.0)
