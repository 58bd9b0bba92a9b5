"""One stage from configuration to result: seed, build, fit, export."""

import atexit
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, Checkpoint, LambdaCallback, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from omegaconf import DictConfig
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from rlhf.artifacts import (
    complete_export,
    describe_provenance,
    export_result,
    open_sources,
    output_of,
    policies_to_evaluate,
    resolve_input,
    with_adapter,
)
from rlhf.callbacks import (
    CheckFolder,
    ExportHeader,
    PreflightChecks,
    PreflightOnly,
    check_averaging,
    log_early_stopping,
)
from rlhf.checkpoint.resume import check_start, finished_result, remove_earlier, resume_checkpoint
from rlhf.checkpoint.signals import report_signals
from rlhf.command import command_line
from rlhf.config import check_values
from rlhf.distributed import disconnect, is_rank_zero, remember_launcher
from rlhf.errors import ConfigError
from rlhf.export.content import parse_json
from rlhf.files import write_json
from rlhf.fsdp import check_loadable, without_sharding
from rlhf.hparams import log_hyperparameters
from rlhf.lineage import check_resumable, warn_about_parents
from rlhf.logs import quiet_libraries
from rlhf.models import ModelSource
from rlhf.output_directory import OutputDirectory, StartOutput
from rlhf.process.heap import keep_heap, release_heap
from rlhf.speed import set_speed
from rlhf.stage.out_of_memory import report_out_of_memory
from rlhf.stages import stages
from rlhf.sweep import Monitored

log = logging.getLogger(__name__)


def run_stage(
    cfg: DictConfig,
    on_start: Callable[[], None] | None = None,
    overrides: Sequence[str] | None = None,
    later: Sequence[DictConfig] = (),
) -> float:
    """Run one stage, write its outputs, and return its monitored metric.

    Args:
        cfg: The configuration of the stage.
        on_start: Called when configuration, data and models have been accepted.
        overrides: The overrides of a step of a pipeline. None: those of the command line.
        later: The configurations of the later steps of a pipeline, whose earlier results ``overwrite=true`` replaces.
    """
    quiet_libraries()
    output = Path(cfg.paths.output)
    check_values(cfg)
    apply_speed(cfg)
    atexit.register(disconnect)  # Lightning does so for NCCL only.
    if cfg.speed.keep_heap and _uses_cpu(cfg.trainer.accelerator):
        keep_heap()
    check_start(cfg, output)
    directory = OutputDirectory(cfg, output, f"{cfg.stage_name}.log")
    with directory.opened():
        started = time.perf_counter()
        lightning.seed_everything(cfg.seed, workers=True, verbose=False)
        start = StartOutput(directory, on_start)
        if stages()[cfg.stage_name].exports:
            monitored = train(cfg, output, start, command_line(cfg, overrides), later)
        elif cfg.check == "only":
            log.info("check=only: stage=%s trains nothing, so it was not run.", cfg.stage_name)
            monitored = float("nan")
        else:
            monitored = collect(cfg, output, start) if cfg.stage_name == "collect" else evaluate(cfg, start)
        log.info("stage=%s took %.0f s; its outputs are in %s", cfg.stage_name, time.perf_counter() - started, output)
        release_heap()  # The next stage of a pipeline needs tensors of other sizes.
        return monitored


def apply_speed(cfg: DictConfig) -> None:
    """Apply ``speed`` of a configuration to this process."""
    set_speed(instantiate(cfg.speed))
    torch.backends.cuda.enable_cudnn_sdp(cfg.speed.cudnn_attention)


def _uses_cpu(accelerator: str) -> bool:
    """Return whether an accelerator of the Trainer is the CPU. A GPU frees the host's copies of its models."""
    return accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())


def train(cfg: DictConfig, output: Path, start: StartOutput, command: str, later: Sequence[DictConfig] = ()) -> float:
    """Train one stage, export its result, and return its monitored metric; NaN if there is none."""
    # 1. Find the inputs, so that a missing one is reported before anything is loaded.
    datamodule = instantiate(cfg.data)
    build, inputs = builder_and_adapted_inputs(cfg)
    provenance = describe_provenance(cfg, inputs)
    if (finished := finished_result(cfg, output, provenance)) is not None:
        complete_export(cfg, output, partial(start.start, replaces_configuration=False))
        recorded = finished.provenance
        return Monitored(recorded.get("monitored", "nan"), recorded.get("monitor", ""))
    checkpoint = resume_checkpoint(cfg, output, provenance)

    # 2. Build the module. A tokenizer is trained on the data where the base model is trained from scratch.
    module = build(**inputs, tokenizer=inputs["policy"].tokenizer(datamodule.training_texts()))

    # 3. Train.
    module.nonfinite.run = {"stage": cfg.stage_name, "command": command, "config": provenance["config"]}
    own: list[Callback] = [*([CheckFolder()] if cfg.save_hf else []), start, ExportHeader(provenance)]
    if cfg.check:
        own.append(PreflightChecks(output, provenance, only=cfg.check == "only"))
    if cfg.overwrite and is_rank_zero() and not cfg.trainer.fast_dev_run:
        own.append(LambdaCallback(on_train_start=lambda *_: replace_earlier(cfg, output, start.directory, later)))
    trainer = build_trainer(cfg, own)
    check_loadable(checkpoint, trainer.strategy)
    try:
        fit(cfg, trainer, module, datamodule, checkpoint)
    except PreflightOnly:
        return float("nan")
    if module.validated_step != trainer.global_step and datamodule.records("val"):
        with report_signals(trainer):
            trainer.validate(module, datamodule, verbose=False)

    # 4. Export the result.
    value = trainer.callback_metrics.get(module.monitor)
    monitored = Monitored(float("nan") if value is None else float(value), module.monitor)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        log.warning("trainer.fast_dev_run=true: the result is not exported.")
    else:
        outcome = {"monitor": module.monitor, "monitored": float(monitored), "step": trainer.global_step}
        export_result(cfg, output, module.result(), {**provenance, **outcome})
        log_hyperparameters(trainer, cfg, module.metrics)
    log.info("%s = %s", module.monitor, "none" if value is None else f"{monitored:.4f}")
    return monitored


def replace_earlier(cfg: DictConfig, output: Path, directory: OutputDirectory, later: Sequence[DictConfig]) -> None:
    """Delete what earlier runs of a stage, and of the later steps of its pipeline, have left."""
    remove_earlier(cfg, output, later)
    directory.remove_earlier_logs()


def fit(cfg: DictConfig, trainer: lightning.Trainer, module: Any, datamodule: Any, checkpoint: str | None) -> None:
    """Train a module, from a checkpoint if there is one, and turn what the user can fix into a message."""
    try:
        with report_signals(trainer), report_out_of_memory(cfg.stage_name, module, datamodule):
            trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
    except ValueError as error:
        if "`val_check_interval`" not in str(error):
            raise
        raise ConfigError(
            "trainer.val_check_interval must be at most the number of batches of an epoch, got "
            f"{cfg.trainer.val_check_interval}.",
            "Set trainer.val_check_interval=1.0 for one validation per epoch.",
        ) from error
    log_early_stopping(trainer)
    if 0 <= trainer.max_steps < trainer.global_step:
        log.warning(
            "trainer.max_steps=%d has no effect: the checkpoint has %d optimizer steps already.",
            trainer.max_steps,
            trainer.global_step,
        )


def builder_and_adapted_inputs(cfg: DictConfig) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return what builds the module of a stage from its inputs and a tokenizer, and the inputs with their adapters."""
    build, inputs = _builder_and_inputs(cfg)
    return build, with_adapter(cfg, inputs)


def _builder_and_inputs(cfg: DictConfig) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return what builds the module of a stage, and its inputs. One that is neither used nor set is None."""
    build, required = required_inputs(cfg)
    return build, {key: resolve_input(cfg, key) if key in required else None for key in stages()[cfg.stage_name].inputs}


def required_inputs(cfg: DictConfig) -> tuple[Callable[..., Any], list[str]]:
    """Return what builds the module of a stage, and the names of the inputs that are used or set."""
    build = instantiate(cfg.stage, _partial_=True)
    inputs = stages()[cfg.stage_name].inputs
    unused = build.func.unused_inputs(build.keywords) if inputs else ()
    return build, [key for key in inputs if key not in unused or cfg.stage[key] is not None]


def evaluate(cfg: DictConfig, start: StartOutput) -> float:
    """Compare policies on held-out prompts, print the table, and return the monitored metric."""
    policies = policies_to_evaluate(cfg)
    reward_output = output_of(cfg, "reward")
    chosen = cfg.stage.reward_model or (str(reward_output) if reward_output else None)
    datamodule = instantiate(cfg.data)
    module = instantiate(cfg.stage, _partial_=True)(
        models=policies,
        reward_model=None if chosen is None else open_sources(cfg, chosen),
    )
    _check_vocabularies(policies, module.baseline, module.tokenizer)
    warn_about_parents(policies)
    trainer = build_trainer(without_sharding(cfg), [start])
    with report_signals(trainer), report_out_of_memory(cfg.stage_name, module, datamodule):
        trainer.test(module, datamodule, verbose=False)
    if trainer.is_global_zero:
        Console().print(module.table())
    return Monitored(module.monitored, "win_rate")


def collect(cfg: DictConfig, output: Path, start: StartOutput) -> float:
    """Write preference pairs of the responses of a policy, and return the mean difference of their scores."""
    path, record = output / str(stages()[cfg.stage_name].final), output / "provenance.json"
    datamodule = instantiate(cfg.data)
    build, inputs = _builder_and_inputs(cfg)
    provenance = describe_provenance(cfg, inputs)
    if cfg.resume and path.is_file():
        recorded = parse_json(record.read_text(), str(record), "provenance") if record.is_file() else {}
        check_resumable(str(path), recorded, provenance, force=cfg.resume == "force", is_finished=True)
        log.info("stage=%s is finished: %s stays as it is.", cfg.stage_name, path)
        return float("nan")
    module = build(**inputs)
    trainer = build_trainer(without_sharding(cfg), [start])
    with report_signals(trainer), report_out_of_memory(cfg.stage_name, module, datamodule):
        trainer.test(module, datamodule, verbose=False)
    if is_rank_zero() and not cfg.trainer.fast_dev_run:
        write_json(record, provenance)
    return Monitored(module.metrics.get("score_difference", "nan"), "collect/score_difference")


def _check_vocabularies(policies: dict[str, ModelSource], baseline: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Reject policies whose vocabulary differs from that of the baseline."""
    vocabulary = tokenizer.get_vocab()
    for name, source in policies.items():
        if name != baseline and source.tokenizer(()).get_vocab() != vocabulary:
            raise ConfigError(
                f"stage.models: {name} and the baseline {baseline} have different vocabularies, so their log-probs "
                "cannot be compared.",
                "Evaluate models of one vocabulary: stage.models=[<name>,<name>]",
            )


def build_logger(name: str, cfg: DictConfig) -> Logger:
    """Build a configured logger.

    Raises:
        ConfigError: It needs a package that is not installed.
    """
    try:
        logger: Logger = instantiate(cfg)
    except Exception as error:
        missing = error if isinstance(error, ModuleNotFoundError) else error.__cause__
        if not isinstance(missing, ModuleNotFoundError):
            raise
        raise ConfigError(
            f"logger.{name} needs a package that is not installed: {missing}.",
            f"Install it (pip install {name}), or choose another logger: logger=tensorboard",
        ) from error
    return logger


def build_trainer(cfg: DictConfig, callbacks: list[Callback]) -> lightning.Trainer:
    """Build the Trainer of a stage with the configured callbacks and loggers and the given callbacks.

    Raises:
        ConfigError: The strategy shards models in a way other than ``trainer=fsdp``, or a callback is not supported.
    """
    configured = [instantiate(callback) for callback in cfg.callbacks.values() if callback is not None]
    check_averaging(configured)
    for flag, kind in {"enable_progress_bar": ProgressBar, "enable_checkpointing": Checkpoint}.items():
        if cfg.trainer[flag] is False:
            configured = [callback for callback in configured if not isinstance(callback, kind)]
    loggers = [build_logger(name, logger) for name, logger in cfg.logger.items() if logger is not None]
    flags: dict[str, Any] = {"callbacks": [*configured, *callbacks], "logger": loggers}
    if cfg.trainer.enable_checkpointing is None and not any(isinstance(one, Checkpoint) for one in configured):
        flags["enable_checkpointing"] = False  # Otherwise, Lightning writes checkpoints to the directory of a logger.
    trainer: lightning.Trainer = instantiate(cfg.trainer, **flags)
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ConfigError(
            f"trainer.strategy={cfg.trainer.strategy} is not supported: only FSDP2 shards models.", "Set trainer=fsdp"
        )
    remember_launcher(trainer.strategy.launcher)
    return trainer
