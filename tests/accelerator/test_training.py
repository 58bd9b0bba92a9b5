"""What training does beyond its plain steps, on the emulated device."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from accelerator.device import DEVICE
from accelerator.reads import summarize
from accelerator.runs import KINDS, DeviceRuns, logged
from accelerator.test_reads import StepReads
from harness import DEMONSTRATIONS, EXACT, PAIRS, Run, assert_same_weights
from rlhf.callbacks import PreflightChecks, PreflightOnly
from rlhf.checkpoint import RunCheckpoint
from rlhf.errors import TrainingError
from rlhf.export import Export, save_result
from rlhf.ppo import PPOModule
from rlhf.rl import KLController, UpdateLimits


def assert_same_run(on_device: Run, on_cpu: Run) -> None:
    """Assert that two runs have the same weights and have logged the same values, throughput aside."""
    weights = [dict(run.module.named_parameters()) for run in (on_device, on_cpu)]
    torch.testing.assert_close(*weights, **EXACT)
    assert logged(on_device) == logged(on_cpu) != []


# Updates


@pytest.mark.parametrize("kind", ["ppo", "ppo_shared", "grpo"])
def test_skipped_updates(runs: DeviceRuns, kind: str) -> None:
    """The limit skips every minibatch but the first of each rollout. A skipped step has no gradients on the device."""
    keys = {"minibatch_size": 4, "ppo_epochs": 2, "limits": UpdateLimits(stop_kl_per_token=1e-12)}
    on_device, on_cpu = runs.both(kind, **keys)
    assert_same_run(on_device, on_cpu)
    skipped = on_device.curve("policy/skipped")
    assert skipped == on_cpu.curve("policy/skipped")
    assert all(0.5 <= share < 1 for share in skipped)


def test_minibatches_skipped_by_their_ratio(runs: DeviceRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second minibatch claims that its tokens were 10 times less likely when they were sampled."""
    iteration = PPOModule.iteration

    def shifted_iteration(self: PPOModule, prompts: Any) -> Any:
        for number, minibatch in enumerate(iteration(self, prompts)):
            minibatch.old_logprobs = minibatch.old_logprobs - 2.3 * (number % 2)
            yield minibatch

    monkeypatch.setattr(PPOModule, "iteration", shifted_iteration)
    on_device, on_cpu = runs.both("ppo", minibatch_size=2, limits=UpdateLimits(skip_ratio=5.0))
    assert_same_run(on_device, on_cpu)
    assert on_device.curve("policy/skipped") == [0.5, 0.5]


@pytest.mark.parametrize("apply_to", ["reward", "loss"])
def test_adaptive_kl(runs: DeviceRuns, apply_to: str) -> None:
    kl = {"target_per_sequence": 1.0, "horizon": 100, "apply_to": apply_to, "estimator": "k3"}
    on_device, on_cpu = runs.both("ppo", kl=KLController(**kl), kl_coef=0.2)
    assert_same_run(on_device, on_cpu)
    assert on_device.module.kl.coef == on_cpu.module.kl.coef != 0.2


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("ppo", {"kl": KLController(estimator="full", apply_to="loss"), "entropy_coef": 0.1, "critic_warmup": 1}),
        ("ppo", {"rollout_batch_size": 3, "whiten_rewards": True, "gradient_checkpointing": True}),
        ("grpo", {"loss_reduction": "sequence_mean", "limits": UpdateLimits(dual_clip=3.0)}),
        ("dpo", {"gradient_checkpointing": True, "sft_coef": 0.5, "precompute_ref_logprobs": False}),
        ("reward", {"num_heads": 2, "num_layers": 2, "centering_coef": 0.01, "label_smoothing": 0.1}),
    ],
)
def test_options(runs: DeviceRuns, kind: str, keys: dict[str, Any]) -> None:
    assert_same_run(*runs.both(kind, **keys))


@pytest.mark.parametrize(("kind", "keys"), [("sft", {}), ("kto", {}), ("ppo", {"minibatch_size": 2})])
def test_clipping_and_accumulation(runs: DeviceRuns, kind: str, keys: dict[str, Any]) -> None:
    flags = {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2}
    on_device, on_cpu = runs.both(kind, trainer=flags, **keys)
    assert_same_run(on_device, on_cpu)
    assert on_device.recorder.grad_norms == pytest.approx([0.01] * len(on_device.recorder.grad_norms), rel=1e-3)


# Numbers that are not finite


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "kto", "ppo"])
def test_a_loss_that_is_not_finite_is_caught_between_two_logged_steps(runs: DeviceRuns, kind: str) -> None:
    """The step costs no more reads than a step that logs: those of the forward passes and one of the norm."""

    class Planted(StepReads):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                with torch.no_grad():
                    next(weight for name, weight in module.named_parameters() if "gate_proj" in name).mul_(torch.nan)
            super().on_train_batch_start(trainer, module, batch, batch_idx)

    reads = Planted()
    run = runs.run(kind, callbacks=[reads], trainer={"log_every_n_steps": 50})
    run.trainer.callbacks.remove(run.recorder)
    with pytest.raises(TrainingError, match="optimizer step 2: the loss is nan"):
        run.fit()
    assert len(reads.steps[0]) <= (5 if kind == "kto" else 3), summarize(reads.steps[0])
    reads.recording.__exit__(None, None, None)


# Validation


@pytest.mark.parametrize("kind", ["sft", "ratings", "dpo", "ppo"])
def test_validation_and_early_stopping(runs: DeviceRuns, kind: str) -> None:
    """The monitored metric never improves by 100, so training stops after the second of three epochs."""
    stage, _ = KINDS[kind]
    val = runs.write("val", DEMONSTRATIONS if stage in ("sft", "ppo", "grpo") else PAIRS)
    data = {"val_fraction": 0.25} if kind == "ratings" else {"val": val}
    samples = {"samples": 2} if kind in ("sft", "dpo") else {}
    monitor = {"sft": "val/loss", "reward": "val/loss", "ppo": "val/score", "grpo": "val/score"}.get(stage)
    stopping = EarlyStopping(monitor or "val/rewards/accuracies", min_delta=100.0, patience=1)
    keys = {"data": data, "trainer": {"max_epochs": 3}, **samples}
    on_device, on_cpu = runs.both(kind, callbacks=lambda: [deepcopy(stopping)], **keys)
    assert on_device.trainer.current_epoch == on_cpu.trainer.current_epoch == 2
    assert_same_run(on_device, on_cpu)
    assert any(name.startswith("val/") for call in on_device.logger.calls for name in call)


# Checkpoints and exports


@pytest.mark.parametrize(
    ("kind", "precision"),
    [*((kind, "32-true") for kind in ("sft", "kto", "ppo", "grpo")), ("sft", "bf16-mixed")],
)
def test_a_resumed_run_equals_an_uninterrupted_one(runs: DeviceRuns, kind: str, precision: str) -> None:
    """In every bit, although the device has its own generator: one epoch and a second one, or both at once."""

    def fit(epochs: int, name: str, resume: Path | None = None) -> Run:
        callback = RunCheckpoint(every_n_minutes=None, dirpath=str(runs.folder / name), save_last=True, save_top_k=0)
        flags = {"max_epochs": epochs, "enable_checkpointing": True}
        return runs.run(kind, precision=precision, trainer=flags, callbacks=[callback]).fit(resume)

    whole = fit(2, "whole")
    fit(1, "first")
    resumed = fit(2, "second", resume=runs.folder / "first" / "last.ckpt")
    assert_same_weights(resumed.module, whole.module, **EXACT)
    assert resumed.trainer.global_step == whole.trainer.global_step


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_exports_from_the_device_open_on_the_cpu(runs: DeviceRuns, kind: str) -> None:
    run = runs.run(kind).fit()
    expected = {name: weight.clone() for name, weight in run.module.result().model.state_dict().items()}
    run.module.to(DEVICE)
    path = runs.folder / "final.pt"
    save_result(run.module.result(), path, {})
    assert {weight.device.type for weight in torch.load(path, weights_only=True)["weights"].values()} == {"cpu"}
    export = Export(str(path))
    model: Any = export.scalar_model(runs.tokenizer) if kind == "reward" else export.language_model(runs.tokenizer)
    torch.testing.assert_close(dict(model.state_dict()), expected, **EXACT)
    ids = torch.arange(3, 9)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        on_cpu = model(ids, mask) if kind == "reward" else model(ids).logits
        model.to(DEVICE)
        on_device = model(ids.to(DEVICE), mask.to(DEVICE)) if kind == "reward" else model(ids.to(DEVICE)).logits
    torch.testing.assert_close(on_device.cpu(), on_cpu)


# What single stages do


@pytest.mark.parametrize("num_heads", [1, 2])
def test_reward_centering_and_report(runs: DeviceRuns, num_heads: int) -> None:
    data = {"val": runs.write("val", PAIRS), "demonstrations": runs.write("demonstrations", DEMONSTRATIONS)}
    on_device, on_cpu = runs.both("reward", num_heads=num_heads, data=data)
    assert torch.equal(on_device.module.model.reward_mean, on_cpu.module.model.reward_mean)
    assert bool((on_device.module.model.reward_mean != 0).all())
    assert on_device.logger.calls[-1] == on_cpu.logger.calls[-1]
    assert "report/accuracy" in on_device.logger.calls[-1]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_cached_reference_logprobs(runs: DeviceRuns, kind: str) -> None:
    """Log-probs that the device computes are read from the cache by the next run."""
    cache = runs.folder / "cache"
    first, second = (runs.run(kind, ref_logprobs_cache=str(cache)).fit() for _ in range(2))
    assert len(list(cache.iterdir())) == 1
    assert_same_weights(first.module, second.module, **EXACT)


def test_kto_baseline(runs: DeviceRuns) -> None:
    """The KL baseline of mismatched sequences, which has no gradient, is computed on the device."""
    on_device, on_cpu = runs.both("kto", trainer={"max_steps": 2})
    batches = [run.batches[-1] for run in (on_device, on_cpu)]
    on_device.module.to(DEVICE)
    baselines = [run.module.kl_baseline(batch) for run, batch in zip((on_device, on_cpu), batches, strict=True)]
    assert baselines[0].device == DEVICE
    torch.testing.assert_close(baselines[0].cpu(), baselines[1])
    assert not baselines[0].requires_grad


@pytest.mark.parametrize(
    ("kind", "precision"),
    [*((kind, "32-true") for kind in ("sft", "reward", "dpo", "ppo")), ("ppo", "bf16-mixed")],
)
def test_preflight_checks(runs: DeviceRuns, kind: str, precision: str) -> None:
    checks = PreflightChecks(runs.folder, {}, only=True)
    with pytest.raises(PreflightOnly):
        runs.run(kind, precision=precision, callbacks=[checks]).fit()
