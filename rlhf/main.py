"""What ``train.py`` runs: one stage, or the pipeline."""

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from rlhf.config import check_choices
from rlhf.distributed import barrier
from rlhf.pipeline import run_pipeline
from rlhf.run import run_stage
from rlhf.run_names import check_run_name


def run(cfg: DictConfig) -> float:
    """Run one stage, or the pipeline, and return the metric that a sweep optimizes.

    Args:
        cfg: The composed configuration. Each job of a multirun gets its own copy, whose ``paths.output`` is set to the
            directory that Hydra has created for the job.
    """
    check_run_name(cfg.run)
    check_choices(cfg)
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        cfg = cfg.copy()
        cfg.paths.output = HydraConfig.get().runtime.output_dir
    monitored = run_pipeline(cfg) if cfg.stage_name == "pipeline" else run_stage(cfg)
    barrier()  # Rank 0 serves the connections of all ranks, so it must not end first.
    return monitored
