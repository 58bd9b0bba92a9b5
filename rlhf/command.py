"""The command line of a stage, for messages."""

import shlex
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from rlhf.overrides import quote


def command_line(cfg: DictConfig, overrides: Sequence[str] | None = None) -> str:
    """Return the command that runs a stage as it is running now, on its own or as a step of a pipeline.

    Args:
        cfg: The configuration of the stage.
        overrides: The overrides of a step of a pipeline. None: those of the command line.
    """
    directory: list[str] = []
    if overrides is None:
        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
            directory = [f"paths.output={quote(cfg.paths.output)}"]  # of a job of a sweep
    own = [override for override in overrides if not _is_left_out(override.split("=")[0].lstrip("+"))]
    return shlex.join(["python", "train.py", f"stage={cfg.stage_name}", *own, *directory])


def _is_left_out(key: str) -> bool:
    return key in ("stage", "resume", "replay") or key.startswith("pipeline.")
