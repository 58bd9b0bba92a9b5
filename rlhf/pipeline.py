"""All stages in order: each step's configuration is composed as if its command had been typed."""

import logging
import time
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from rlhf.errors import UserError
from rlhf.export import FINAL, RL_TRAINED
from rlhf.logs import log_file
from rlhf.run import run_stage

log = logging.getLogger(__name__)
STEPS = (*FINAL, "evaluate")


def run_pipeline(cfg: DictConfig) -> float:
    """Run the steps of ``pipeline.steps``; the last one's figure of merit.

    Every step's configuration is composed before the first one starts, so that a mistyped key costs nothing.
    """
    steps = list(cfg.pipeline.steps)
    known = (*STEPS, *cfg.pipeline.variants)
    if unknown := [step for step in (*steps, *cfg.pipeline.overrides) if step not in known]:
        raise UserError(f"pipeline: there is no step {', '.join(unknown)}", f"steps: {', '.join(known)}")
    if taken := [name for name in cfg.pipeline.variants if name in STEPS]:
        raise UserError(f"pipeline.variants.{taken[0]}: there is a stage of that name", "another name")
    if idle := [step for step, own in cfg.pipeline.overrides.items() if own and step not in steps]:
        raise UserError(f"pipeline.overrides.{idle[0]} changes a step that pipeline.steps={steps} leaves out")
    folder = Path(cfg.paths.output if _is_sweep(cfg) else cfg.paths.run)
    configs = {step: step_config(cfg, step, folder) for step in steps}

    merit, seconds = float("nan"), {}
    with log_file(folder / "pipeline" / "pipeline.log"):
        for number, (step, config) in enumerate(configs.items(), 1):
            log.info("step %d of %d: %s", number, len(steps), step)
            OmegaConf.save(config, _made(Path(config.paths.output) / ".hydra") / "config.yaml")
            started = time.perf_counter()
            merit = run_stage(config)
            seconds[step] = time.perf_counter() - started
    Console().print(_where(folder, configs, seconds))
    return merit


def step_config(cfg: DictConfig, step: str, folder: Path) -> DictConfig:
    """The configuration of one step: what was typed for all, then what was typed for this step."""
    typed = [
        override
        for override in HydraConfig.get().overrides.task
        if override.split("=")[0].lstrip("+~") not in ("stage",)
    ]
    shared = [override for override in typed if not override.lstrip("+~").startswith("pipeline.")]
    variant = cfg.pipeline.variants.get(step)
    kind = [f"stage={step}"] if variant is None else [*variant, f"paths.output='{folder / step}'"]
    own = list(cfg.pipeline.overrides.get(step, []))
    return compose("config", overrides=[*kind, *shared, f"paths.run='{folder}'", *own])


def _is_sweep(cfg: DictConfig) -> bool:
    return str(cfg.paths.output) != str(Path(cfg.paths.run) / "pipeline")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _where(folder: Path, configs: dict[str, DictConfig], seconds: dict[str, float]) -> Table:
    table = Table(title=f"where everything lies; {sum(seconds.values()):.0f} s in all")
    for title in ("step", "seconds", "files"):
        table.add_column(title, justify="right" if title == "seconds" else "left", overflow="fold")
    for step, config in configs.items():
        output = Path(config.paths.output)
        files = [
            output / name
            for name in (FINAL.get(config.stage_name, "metrics.json"), "samples.jsonl", f"{config.stage_name}.log")
        ]
        table.add_row(step, f"{seconds[step]:.0f}", "\n".join(str(file) for file in files if file.is_file()))
    if (final := folder / RL_TRAINED).is_file():
        table.add_row("result", "", f'{final}   (load_model("rl_trained"))')
    table.add_row("curves", "", f"tensorboard --logdir {folder}")
    return table
