"""Tests on a real GPU: ``pytest -m gpu``. They train every stage, as the tests on the emulated device do."""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from harness import (
    EXACT,
    ON_POLICY,
    PROMPTS,
    STAGES,
    TINY_MODEL,
    FakeSource,
    Run,
    TinyRun,
    assert_same_weights,
    one_architecture,
    run_train,
)
from rlhf import load_model
from rlhf.callbacks import PreflightChecks, PreflightOnly
from rlhf.models import Transformer, disable_dropout
from rlhf.sampling import LocalSampler, Rollout, SamplingParams
from rlhf.speed import speed

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Deterministic runs need it before the first product.

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
GPU = {"accelerator": "gpu", "devices": 1}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
# An update that is proportional to the gradient: rounding errors of small gradients stay small.
PROPORTIONAL = {"eps": 1.0, "learning_rate": 1.0}
ROUNDING = {"rtol": 1e-3, "atol": 1e-4}
TINY = ("trainer.max_steps=4", "data.max_rows=64", "model.vocab_size=300")
WITHOUT_OPTIMIZATIONS = {
    **dict.fromkeys(("fused_logprobs", "fused_mlp", "fused_rms_norm", "packed_rows", "shared_prompts"), False),
    **dict.fromkeys(("partial_last_layer", "lean_decoding"), False),
    "row_groups": 1,
}


class RecordedSampler(LocalSampler):
    """Returns the responses that an earlier run has sampled, or samples and records them."""

    def __init__(self, recorded: Sequence[Rollout] = ()) -> None:
        super().__init__()
        self.recorded, self.rollouts = list(recorded), list[Rollout]()

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Rollout:
        assert self.policy is not None
        rollout = self.recorded.pop(0) if self.recorded else super().sample(prompts, params)
        self.rollouts.append(rollout.to("cpu"))
        torch.manual_seed(len(self.rollouts))  # Only the first run has drawn random numbers.
        return rollout.to(self.policy.device)


class Waits(lightning.Callback):
    """Counts how often the host waits for the GPU in each training step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.catching = warnings.catch_warnings(record=True)
        self.caught: Any = self.catching.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.catching.__exit__(None, None, None)
        self.counts.append(sum("synchronizing" in str(warning.message) for warning in self.caught))


def changed_weights(run: Run) -> bool:
    """Return whether training has changed any weight."""
    before = run.recorder.initial_weights
    return any(not torch.equal(weight.cpu(), before[name].cpu()) for name, weight in run.module.named_parameters())


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    """Restore the settings of the process that a test may have changed."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_per_process_memory_fraction(1.0)


# Training


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_preflight_checks_pass(tiny_run: TinyRun, stage: str, precision: str) -> None:
    """Masks, padding, accumulation, sampling compared with scoring, the first ratio, and the export."""
    checks = PreflightChecks(tiny_run.folder, {}, only=True)
    run = tiny_run.build(stage, callbacks=[checks], trainer={**GPU, "precision": precision})
    with pytest.raises(PreflightOnly):
        run.fit()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_in_every_precision(tiny_run: TinyRun, stage: str, precision: str) -> None:
    flags = {**GPU, "precision": precision, "max_epochs": 2, "gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    run = tiny_run.train(stage, trainer=flags, gradient_checkpointing=True)
    assert changed_weights(run)
    assert [call for call in run.logger.calls if not all(map(math.isfinite, call.values()))] == []


@pytest.mark.parametrize("stage", STAGES)
def test_training_equals_that_on_the_cpu(tiny_run: TinyRun, stage: str) -> None:
    """Both compute in float32, with the same responses. The GPU sums in another order."""

    def train(trainer: dict[str, Any], recorded: Sequence[Rollout] = ()) -> tuple[Run, list[Rollout]]:
        sampler = RecordedSampler(recorded)
        keys = {"sampler": sampler} if stage in ON_POLICY else {}
        return tiny_run.train(stage, trainer={**trainer, "max_epochs": 2}, **PROPORTIONAL, **keys), sampler.rollouts

    on_cpu, rollouts = train({})
    on_gpu, _ = train(GPU, rollouts)
    assert changed_weights(on_cpu)
    assert_same_weights(on_gpu.module.cpu(), on_cpu.module, **ROUNDING)


@pytest.mark.parametrize("stage", STAGES)
def test_optimizations_change_nothing_but_rounding(tiny_run: TinyRun, stage: str) -> None:
    """PPO and GRPO sample the same responses, because both decoders draw the same random numbers."""
    plain = tiny_run.train(stage, trainer=GPU, **PROPORTIONAL)
    with speed(**WITHOUT_OPTIMIZATIONS):
        unoptimized = tiny_run.train(stage, trainer=GPU, **PROPORTIONAL)
    assert_same_weights(plain.module.cpu(), unoptimized.module.cpu(), **ROUNDING)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_run: TinyRun, tmp_path: Path, stage: str, architecture: str
) -> None:
    """PPO and GRPO continue with the random state of the GPU. Mamba-2 has cumulative sums, which True refuses."""
    flags = {**GPU, "deterministic": True if architecture == "transformer" else "warn"}
    uninterrupted = tiny_run.train(stage, trainer={**flags, "max_epochs": 2})
    tiny_run.train(stage, trainer=flags).trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = tiny_run.train(stage, trainer={**flags, "max_epochs": 2}, resume=tmp_path / "last.ckpt")
    assert_same_weights(resumed.module.cpu(), uninterrupted.module.cpu(), **EXACT)


@one_architecture
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_hardly_waits(tiny_run: TinyRun, stage: str) -> None:
    """The bounds are those of the emulated device. The first step may wait for other reasons."""
    waits = Waits()
    flags = {**GPU, "max_epochs": 2, "log_every_n_steps": 50, "gradient_clip_val": 1.0}
    run = tiny_run.build(stage, callbacks=[waits], trainer=flags)
    run.trainer.callbacks.remove(run.recorder)  # It reads the metrics of every step.
    run.fit()
    assert len(waits.counts) >= 2
    assert max(waits.counts[1:]) <= (5 if stage == "kto" else 3)


# Memory


def test_batches_that_do_not_fit_are_halved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """With 60 % of the memory that a step takes, training gives the same weights."""
    source = Transformer(hidden_size=256, num_layers=4, num_heads=4, intermediate_size=1024, max_length=128)
    tiny_run = TinyRun(tmp_path, tokenizer, source.language_model(tokenizer))
    rows = [{"prompt": prompt, "completion": "So. " * 20} for prompt in PROMPTS * 32]
    data = {"train": tiny_run.write("long", rows), "batch_size": len(rows)}

    def train(**keys: Any) -> Run:
        return tiny_run.train("sft", data=data, trainer={**GPU, "max_epochs": 2}, **PROPORTIONAL, **keys)

    torch.cuda.reset_peak_memory_stats()
    whole = train()
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    halved = train(on_out_of_memory="halve")
    assert halved.module.splitter.chunks > 1
    assert_same_weights(halved.module.cpu(), whole.module.cpu(), **ROUNDING)


# Sampling


def test_greedy_responses_are_those_of_generate(policy: FakeSource, tokenizer: PreTrainedTokenizerFast) -> None:
    lm: Any = disable_dropout(policy.language_model(tokenizer)).to(DEVICE)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    sampler = LocalSampler()
    sampler.sync(lm, tokenizer)
    rollout = sampler.sample(prompts, SamplingParams(max_new_tokens=16, temperature=0.0))
    for prompt, response in zip(prompts, rollout.response_ids(), strict=True):
        expected = lm.generate(torch.tensor([prompt], device=DEVICE), max_new_tokens=16, do_sample=False)
        assert [*prompt, *response] == expected[0].tolist()


@pytest.mark.parametrize("lean", [True, False])
def test_the_seed_determines_the_responses(policy: FakeSource, tokenizer: PreTrainedTokenizerFast, lean: bool) -> None:
    lm = disable_dropout(policy.language_model(tokenizer)).to(DEVICE)
    sampler = LocalSampler()
    sampler.sync(lm, tokenizer)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS] * 4

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        with speed(lean_decoding=lean):
            return sampler.sample(prompts, SamplingParams(max_new_tokens=16, temperature=1.0)).response_ids()

    assert sample(1) == sample(1) != sample(2)


# Commands


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", "mamba"])
def test_the_pipeline_runs_in_bfloat16(repo: Path, tmp_path: Path, model: str) -> None:
    """``trainer=gpu`` runs every stage for a few steps, and the result samples on the GPU."""
    run_train(repo, tmp_path, "trainer=gpu", *TINY, *TINY_MODEL[model])
    policy, tokenizer, device = load_model(tmp_path / "rlhf" / "final_rl_model.pt")
    assert device.type == DEVICE
    prompt = tokenizer(PROMPTS[0], return_tensors="pt").to(device)
    assert policy.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_the_pipeline_runs_with_nccl(repo: Path, tmp_path: Path, trainer: str) -> None:
    """All GPUs of this machine."""
    run_train(repo, tmp_path, f"trainer={trainer}", *TINY, *TINY_MODEL["transformer"])
    assert (tmp_path / "rlhf" / "final_rl_model.pt").is_file()
