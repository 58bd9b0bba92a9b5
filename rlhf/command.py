"""The command line of a run, for messages."""

import shlex
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig


def command_line(cfg: DictConfig) -> str:
    """Return the command that runs a stage as it is running now, on its own or as a step of a pipeline."""
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    own: list[Any] = []
    for override in typed:
        key = override.split("=")[0].lstrip("+")
        if key == f"pipeline.overrides.{cfg.stage_name}":
            listed: Any = OverridesParser.create().parse_override(override).value()
            own += listed
        elif key not in ("stage", "resume", "replay") and not key.startswith("pipeline."):
            own.append(override)
    return shlex.join(["python", "train.py", f"stage={cfg.stage_name}", *map(str, own)])
