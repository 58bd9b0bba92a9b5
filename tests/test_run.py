"""One stage from configuration to result, in this process; ``test_train.py`` runs complete commands."""

import io
import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from contract.configs import compose_config
from harness import STAGES, TINY_DATA, TINY_MODEL, RunRecorder, TinyRun
from rlhf import callbacks, run
from rlhf.errors import ConfigError
from rlhf.export import Export, save_result
from rlhf.models import ModelSource
from rlhf.run import build_trainer, run_stage
from rlhf.stage import Result


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


# The Trainer


def trainer_of(*overrides: str, extra: list[Callback] | None = None) -> lightning.Trainer:
    return build_trainer(compose_config("stage=sft", "trainer=cpu", *overrides), extra or [])


def callback_names(trainer: lightning.Trainer) -> set[str]:
    return {type(callback).__name__ for callback in trainer.callbacks}


def test_the_trainer_gets_configured_and_given_callbacks(tmp_path: Path) -> None:
    recorder = RunRecorder()
    trainer = trainer_of(f"paths.root={tmp_path}", extra=[recorder])
    assert recorder in trainer.callbacks
    assert {"RichProgressBar", "Alerts", "RunCheckpoint"} <= callback_names(trainer)


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("trainer.enable_progress_bar=false", "RichProgressBar"),
        ("trainer.enable_checkpointing=false", "RunCheckpoint"),
        ("callbacks.checkpoint=null", "RunCheckpoint"),
        ("callbacks.alerts=null", "Alerts"),
    ],
)
def test_callbacks_can_be_switched_off(tmp_path: Path, override: str, name: str) -> None:
    """By ``null``, or by a flag of the Trainer, which Lightning alone would reject next to the configured callback."""
    assert name in callback_names(trainer_of(f"paths.root={tmp_path}"))
    assert name not in callback_names(trainer_of(f"paths.root={tmp_path}", override))


def test_without_the_callback_lightning_writes_no_checkpoints_either(tmp_path: Path) -> None:
    trainer = trainer_of(f"paths.root={tmp_path}", "callbacks.checkpoint=null")
    assert trainer.checkpoint_callbacks == []


def test_stochastic_weight_averaging_is_rejected() -> None:
    """It would change the learning rate but not the weights. EMA is accepted."""
    module = "+callbacks.average={_target_: lightning.pytorch.callbacks."
    with pytest.raises(ConfigError, match=r"^callbacks: StochasticWeightAveraging is not supported: .*\n  Use EMA"):
        trainer_of(f"{module}StochasticWeightAveraging, swa_lrs: 0.01}}")
    assert "EMAWeightAveraging" in callback_names(trainer_of(f"{module}EMAWeightAveraging}}"))


def sharded_trainer(**flags: Any) -> SimpleNamespace:
    """Stands for a Trainer with FSDP, which Lightning does not build without a GPU."""
    return SimpleNamespace(strategy=FSDPStrategy())


def test_other_ways_of_sharding_are_rejected() -> None:
    """Exports would contain one shard only."""
    target = f"trainer._target_={__name__}.sharded_trainer"
    with pytest.raises(ConfigError, match=r"^trainer\.strategy=fsdp is not supported: .*\n  Set trainer=fsdp$"):
        trainer_of("trainer.strategy=fsdp", target)


# Training


@pytest.fixture
def configure(tmp_path: Path) -> Any:
    """Return a function that composes a tiny run in ``tmp_path``."""

    def compose(stage: str, *overrides: str) -> DictConfig:
        tiny = [*TINY_MODEL["transformer"], *TINY_DATA, "trainer.enable_progress_bar=false", f"paths.root={tmp_path}"]
        return compose_config(f"stage={stage}", *tiny, *overrides)

    return compose


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "rlhf"


SFT = ["stage.samples=0", "data.batch_size=8", "trainer.max_steps=1", "trainer.limit_val_batches=1"]


def test_a_stage_exports_its_result_and_returns_its_metric(configure: Any, directory: Path) -> None:
    """Training stops within the first epoch, before any validation, so a validation run computes the metric."""
    monitored = run_stage(configure("sft", *SFT))
    log = (directory / "sft" / "sft.log").read_text()
    assert f"val/loss = {monitored:.4f}" in log
    assert "stage=sft took" in log
    export = Export(str(directory / "sft" / "sft_final.pt"))
    assert export.provenance["stage"] == "sft"
    assert len(export.tokenizer()) == 300
    events = EventAccumulator(str(directory / "sft" / "tensorboard" / "version_0")).Reload()
    assert [event.value for event in events.Scalars("final/val/loss")] == pytest.approx([monitored])


def test_the_monitored_metric_is_that_of_the_exported_weights(configure: Any) -> None:
    """Training stops within the second epoch, after the validation of the first one."""
    keys = ["stage.samples=0", "data.batch_size=8", "trainer.max_epochs=2", "trainer.max_steps=7", "overwrite=true"]
    stopped = run_stage(configure("sft", *keys))
    validated_at_the_end = run_stage(configure("sft", *keys, "trainer.check_val_every_n_epoch=9"))
    assert stopped == validated_at_the_end


def test_a_run_without_an_end_is_rejected(configure: Any) -> None:
    """The schedule has no length. ``trainer.max_time`` does not give it one."""
    keys = ["trainer.max_epochs=-1", "trainer.max_steps=-1", "trainer.max_time=00:01:00:00"]
    with pytest.raises(ConfigError, match=r"neither trainer\.max_epochs nor trainer\.max_steps ends it"):
        run_stage(configure("sft", "stage.samples=0", *keys))


def test_the_seed_makes_a_run_reproducible(configure: Any) -> None:
    first, second, other = (run_stage(configure("sft", *SFT, f"seed={seed}", "overwrite=true")) for seed in (1, 1, 2))
    assert first == second != other


def test_fast_dev_run_exports_nothing(configure: Any, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rlhf"):
        run_stage(configure("sft", *SFT, "trainer.fast_dev_run=true"))
    assert "trainer.fast_dev_run=true: the result is not exported." in caplog.text
    assert not list(directory.rglob("*.pt"))


STOPPING = (
    "+callbacks.stopping={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: 1, "
    "min_delta: 100.0}"
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.profiler=simple"], "FIT Profiler Report"),
        (["trainer.profiler=advanced"], "FIT Profiler Report"),
        (["trainer.max_time=00:00:00:00"], "Time limit reached. Elapsed time is"),
        (["trainer.max_epochs=3", "trainer.max_steps=-1", STOPPING], "did not improve in the last 1 records"),
    ],
)
def test_reports_of_lightning_are_shown_and_logged(
    configure: Any, directory: Path, overrides: list[str], message: str
) -> None:
    """Once, without its other messages. What the root logger gets is printed by Hydra."""
    handler = logging.StreamHandler(printed := io.StringIO())
    logging.getLogger().addHandler(handler)
    try:
        run_stage(configure("sft", *SFT, *overrides))
    finally:
        logging.getLogger().removeHandler(handler)
    for text in (printed.getvalue(), (directory / "sft" / "sft.log").read_text()):
        assert text.count(message) == 1
        assert not re.search("GPU available|Tip|Trainer.fit` stopped", text)


FINDER = (
    "+callbacks.finder={_target_: lightning.pytorch.callbacks.LearningRateFinder, num_training_steps: 4, "
    "min_lr: 0.001, max_lr: 0.01}"
)


def test_the_learning_rate_finder_sets_the_peak_of_the_schedule(
    configure: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so after the optimizer and its schedule have been built. A resumed run would start again at step 0."""
    monkeypatch.setattr("lightning.pytorch.tuner.lr_finder._LRFinder.suggestion", lambda self: 0.00789)
    keys = [*SFT, "stage.schedule=constant", "stage.warmup_ratio=0"]
    run_stage(configure("sft", *keys, FINDER, "trainer.max_steps=2"))
    log = (directory / "sft" / "sft.log").read_text()
    assert re.findall(r" step=(\d) .* lr=(\S+)", log) == [("0", "0.00789"), ("1", "0.00789")]
    assert log.count("Learning rate set to 0.00789") == 1
    with pytest.raises(ConfigError, match=r"^LearningRateFinder must not be used in a run that is resumed: "):
        run_stage(configure("sft", *keys, FINDER, "trainer.max_steps=4", "resume=true"))
    run_stage(configure("sft", *keys, "stage.learning_rate=0.00789", "trainer.max_steps=4", "resume=force"))
    assert re.findall(r" step=(\d) ", (directory / "sft" / "sft.log").read_text())[-2:] == ["3", "4"]


def test_check_only_trains_nothing(configure: Any, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr(callbacks, "run_preflight", lambda module, reload: checked.append(module))
    assert math.isnan(run_stage(configure("sft", *SFT, "check=only")))
    assert len(checked) == 1
    assert not list(directory.rglob("*.pt"))
    assert not list(directory.rglob("*.ckpt"))


def test_a_missing_input_is_reported_before_data_are_read(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "build_trainer", lambda *_: pytest.fail("a Trainer was built"))
    with pytest.raises(ConfigError, match=r"^stage=dpo requires the output of stage=sft"):
        run_stage(configure("dpo", "data.train=nowhere.jsonl"))


def test_a_reward_function_without_a_model_needs_no_reward_model(tmp_path: Path) -> None:
    """``reward=exact_match`` reads no reward model, so none has to exist in the run; ``reward=model`` requires one."""
    policy = ["model=pretrained", "model.path=x", f"paths.root={tmp_path}"]
    cfg = compose_config("stage=ppo", *policy, "reward=exact_match")
    build = instantiate(cfg.stage, _partial_=True)
    assert build.func.unused_inputs(build.keywords) == {"reward_model"}
    assert run.builder_and_adapted_inputs(cfg)[1]["reward_model"] is None
    with pytest.raises(ConfigError, match="requires the output of stage=reward"):
        run.builder_and_adapted_inputs(compose_config("stage=ppo", *policy))


# Collection


@pytest.mark.usefixtures("policies")
def test_a_collection_is_not_kept_for_other_settings(configure: Any, directory: Path) -> None:
    """With ``resume=true``; with ``resume=force``, and for a file without a record, the pairs stay as they are."""
    keys = ["stage.sampling.max_new_tokens=4", "data.max_length=64", "reward=python", "reward.path=data/gold.py:score"]
    run_stage(configure("collect", *keys, "data.num_prompts=4"))
    pairs = directory / "collect" / "preferences.jsonl"
    before = pairs.stat().st_mtime_ns
    run_stage(configure("collect", *keys, "data.num_prompts=4", "resume=true"))
    with pytest.raises(ConfigError, match=r"preferences\.jsonl was made with .*: data\.num_prompts was 4 and is 8\."):
        run_stage(configure("collect", *keys, "data.num_prompts=8", "resume=true"))
    run_stage(configure("collect", *keys, "data.num_prompts=8", "resume=force"))
    (directory / "collect" / "provenance.json").unlink()
    run_stage(configure("collect", *keys, "data.num_prompts=8", "resume=true"))
    assert pairs.stat().st_mtime_ns == before


# Evaluation


def test_check_only_evaluates_nothing(configure: Any, directory: Path) -> None:
    assert math.isnan(run_stage(configure("evaluate", "check=only")))
    assert not (directory / "evaluation" / "metrics.json").exists()


@pytest.fixture
def policies(directory: Path, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, source: ModelSource) -> None:
    """SFT and DPO models of one vocabulary, and a model of another one."""
    other = source.tokenizer(["an entirely different text"])
    save_result(Result(lm, tokenizer), directory / "sft" / "sft_final.pt", {})
    save_result(Result(lm, tokenizer), directory / "dpo" / "dpo_final.pt", {})
    save_result(Result(source.language_model(other), other), directory / "other.pt", {})


@pytest.mark.usefixtures("policies")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stage.baseline=ppo"],
            r"^stage\.baseline must be one of the models \(sft, dpo\), got ppo\.\n  Set stage\.baseline=sft\.$",
        ),
        (
            ["stage.models={{sft: sft, other: {directory}/other.pt}}"],
            r"^stage\.models: other and the baseline sft have different vocabularies",
        ),
    ],
)
def test_policies_that_cannot_be_compared_are_rejected(
    configure: Any, directory: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_stage(configure("evaluate", *(override.format(directory=directory) for override in overrides)))


@pytest.mark.usefixtures("policies")
def test_an_evaluation_compares_the_policies_of_the_run(configure: Any, directory: Path) -> None:
    """Without a reward model, the gold score of the bundled data is the only score."""
    small = ["data.max_rows=4", "data.max_length=64", "stage.sampling.max_new_tokens=4", "stage.bootstrap=10"]
    run_stage(configure("evaluate", *small))
    metrics = json.loads((directory / "evaluation" / "metrics.json").read_text())
    assert {"sft", "dpo"} <= metrics["models"].keys()


@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_keeps_the_numbers_in_batches(tiny_run: TinyRun, stage: str) -> None:
    """In bfloat16, the log-prob -129.3 of a response would become -129, and the rating 101.3 would become 101.5."""
    run = tiny_run.train(stage, trainer={"precision": "bf16-true", "max_steps": 1})
    tensors = [value for batch in run.recorder.batches for value in vars(batch).values() if isinstance(value, Tensor)]
    assert {value.dtype for value in tensors if value.is_floating_point()} <= {torch.float32}
    assert all(parameter.isfinite().all() for parameter in run.module.parameters())


# Every stage


@pytest.mark.parametrize(
    ("stage", "precision"), [*((stage, "bf16-mixed") for stage in STAGES), ("sft", "32-true"), ("ppo", "32-true")]
)
def test_every_stage_clips_its_gradients(tiny_run: TinyRun, stage: str, precision: str) -> None:
    """Lightning cannot clip the gradients of a fused AdamW under mixed precision, so the stages do not use it there."""
    flags = {"precision": precision, "gradient_clip_val": 1e-3, "max_steps": 2, "max_epochs": 2}
    run = tiny_run.train(stage, trainer=flags)
    assert run.trainer.global_step == 2
    assert run.recorder.grad_norms == pytest.approx([1e-3, 1e-3], rel=1e-2)
