"""What ``train.py`` runs: one stage, the pipeline, or a command that trains nothing."""

import logging
import sys
from collections import Counter
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig

from rlhf.config import check_choices, check_values, resolve_trainer
from rlhf.files import remove_if_empty
from rlhf.process.garbage import imports
from rlhf.run_names import check_run_name
from rlhf.speed import set_speed
from rlhf.stages import stages
from rlhf.sweep import run_job

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float:
    """Run a stage, the pipeline or a command, or replay a training step; return the metric that a sweep optimizes.

    Args:
        cfg: The composed configuration. Each job of a multirun gets its own copy, whose ``paths.output`` is set to the
            directory that Hydra has created for the job.
    """
    if not _is_job():
        return run_checked(cfg)
    cfg = cfg.copy()
    cfg.paths.output = HydraConfig.get().runtime.output_dir
    return run_job(lambda: run_checked(cfg), Path(cfg.paths.output), HydraConfig.get().overrides.task)


def run_checked(cfg: DictConfig) -> float:
    """Check the names of the run and of the choices, and then run what the configuration asks for."""
    try:
        check_run_name(cfg.run)
        check_choices(cfg)
        warn_about_repeated_keys()
        resolve_trainer(cfg)
        return run_command(cfg) if "command" in cfg else run_stages(cfg)
    finally:
        top = cfg.paths.root and cfg.paths.run  # Null becomes the directory None.
        remove_if_empty(Path(cfg.paths.output), Path(str(top)))  # Hydra creates it even for a rejected command.


def warn_about_repeated_keys() -> None:
    """Warn about a key that the command line sets twice: the last value applies."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    counts = Counter(override.partition("=")[0] for override in overrides)
    for override in overrides:
        key = override.partition("=")[0]
        if counts.pop(key, 1) > 1:
            last = [other for other in overrides if other.partition("=")[0] == key][-1]
            log.warning("%s is set more than once. The last value applies: %s", key, last)


def run_stages(cfg: DictConfig) -> float:
    """Run a stage or the pipeline, or replay a training step; return the metric that a sweep optimizes."""
    with imports():  # Imported here because they load torch, which a command may not need.
        from rlhf.checkpoint.resume import earlier_files
        from rlhf.distributed import barrier
        from rlhf.pipeline import run_pipeline
        from rlhf.replay import replay
        from rlhf.run import run_stage

    if _is_job() and cfg.stage_name in stages() and not earlier_files(cfg, Path(cfg.paths.output)):
        cfg.resume = False  # resume=true starts the jobs that have not begun.
    if cfg.replay is not None:
        monitored = replay(cfg)
    else:
        monitored = run_pipeline(cfg) if cfg.stage_name == "pipeline" else run_stage(cfg)
    barrier()  # Rank 0 serves the connections of all ranks, so it must not end first.
    return monitored


def run_command(cfg: DictConfig) -> float:
    """Call the function that ``command`` configures with the whole configuration, and exit with its result unless 0.

    A command writes no log and no results. It has no metric, so the result of this function is NaN.
    """
    check_values(cfg, ("command", "speed"))
    set_speed(instantiate(cfg.speed))
    with imports():
        command = instantiate(cfg.command, _partial_=True)
    exit_code = command(cfg)
    if exit_code:
        sys.exit(exit_code)
    return float("nan")


def _is_job() -> bool:
    """Return whether this is a job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN
