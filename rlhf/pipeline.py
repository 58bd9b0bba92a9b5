"""All steps of the pipeline in order. Each step is configured as if its own command had been typed."""

import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.artifacts import input_path, load_call, make_final_model, named, open_policies
from rlhf.checkpoint.resume import check_start, earlier_files
from rlhf.config import check_values, resolve_trainer
from rlhf.distributed import is_rank_zero
from rlhf.errors import ConfigError
from rlhf.export import open_model_source
from rlhf.files import FINAL_MODEL
from rlhf.output_directory import OutputDirectory
from rlhf.overrides import quote
from rlhf.printable import printable
from rlhf.report import NAME as REPORT
from rlhf.report import write_run_report
from rlhf.rounds import final_policy, round_steps
from rlhf.run import required_inputs, run_stage
from rlhf.run_names import command_in_run
from rlhf.runs.scan import stage_directories
from rlhf.stages import stages

log = logging.getLogger(__name__)


def run_pipeline(cfg: DictConfig) -> float:
    """Run the steps of ``pipeline.steps`` and return the monitored metric of the last one.

    The configuration of every step is composed before the first one starts, so that a mistyped key is reported at once.
    The steps of ``pipeline.rounds`` follow those of ``pipeline.steps``, and the policy of the last round becomes the
    final model of the run.
    With ``resume=true``, finished steps are skipped, and a step that was interrupted continues from its checkpoint.
    """
    # 1. Check the steps and compose the configuration of each.
    steps = list(cfg.pipeline.steps)
    check_steps(cfg, steps)
    check_directory()
    directory = Path(cfg.paths.output if _is_sweep(cfg) else cfg.paths.run)
    overrides = {step: step_overrides(cfg, step, directory) for step in steps}
    if cfg.pipeline.rounds:
        overrides |= {
            step.name: step_overrides(cfg, step.stage, directory, step.overrides)
            for step in round_steps(cfg, directory)
        }
    configs = {step: step_config(own) for step, own in overrides.items()}
    check_ranks(configs)
    for config in configs.values():
        check_values(config)
        check_start(config, Path(config.paths.output))
    check_inputs(configs)

    # 2. Run them in order.
    monitored, seconds = float("nan"), {}
    own = OutputDirectory(cfg, directory / "pipeline", "pipeline.log")
    with own.opened():
        for number, (step, config) in enumerate(configs.items(), 1):
            log.info("step %d of %d: %s", number, len(configs), step)
            if not earlier_files(config, Path(config.paths.output)):
                config.resume = False  # resume=true starts the steps that have not begun.
            started = time.perf_counter()
            monitored = run_stage(config, own.start, overrides[step], list(configs.values())[number:])
            seconds[step] = time.perf_counter() - started
        if cfg.pipeline.rounds:
            make_final_model(final_policy(cfg, directory), directory)

    # 3. Write the report, and print where the outputs are.
    if is_rank_zero():
        if cfg.pipeline.report:
            write_pipeline_report(cfg, directory)
        Console().print(output_table(directory, configs, seconds))
    return monitored


def write_pipeline_report(cfg: DictConfig, directory: Path) -> None:
    """Write the report of a run. A failure is a warning, because the results of the run are complete without it.

    Args:
        cfg: The configuration of the pipeline.
        directory: Directory of the run, or of this job of a sweep.
    """
    name = str(cfg.run) if directory == Path(cfg.paths.run) else directory.name
    command = command_in_run(directory, "stage=report")
    try:
        if stage_directories(directory):  # With trainer.fast_dev_run=true, no stage writes anything.
            write_run_report(directory, name, directory / REPORT)
    except Exception as error:  # It comes from other libraries as well, and may be of any type.
        log.warning("The report could not be written (%s: %s). To repeat it: %s", type(error).__name__, error, command)


def check_steps(cfg: DictConfig, steps: list[str]) -> None:
    """Reject unknown steps, variants named like a stage, and overrides of a step that does not run.

    Raises:
        ConfigError: The pipeline is configured inconsistently.
    """
    known = (*stages(), *cfg.pipeline.variants)
    if not steps:
        raise ConfigError("pipeline.steps must name at least one step, got [].", "Set pipeline.steps=[sft,reward,ppo].")
    if unknown := [step for step in (*steps, *cfg.pipeline.overrides) if step not in known]:
        raise ConfigError(
            f"pipeline.steps and pipeline.overrides must name known steps, got {', '.join(unknown)}.",
            f"Known steps: {', '.join(known)}.",
        )
    if taken := [name for name in cfg.pipeline.variants if name in stages()]:
        raise ConfigError(
            f"pipeline.variants.{taken[0]} has the name of a stage.", "Choose another name for the variant."
        )
    in_rounds = list(cfg.pipeline.round.steps) if cfg.pipeline.rounds else []
    if idle := [step for step, own in cfg.pipeline.overrides.items() if own and step not in (*steps, *in_rounds)]:
        raise ConfigError(
            f"pipeline.overrides.{idle[0]} has no effect: pipeline.steps=[{','.join(steps)}] lacks this step.",
            f"Remove pipeline.overrides.{idle[0]}, or add {idle[0]} to pipeline.steps.",
        )


def check_directory() -> None:
    """Reject a directory that all steps would write to.

    Raises:
        ConfigError: The command line sets ``paths.output``.
    """
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    if given := [override for override in typed if _key(override) == "paths.output"]:
        raise ConfigError(
            f"{given[0]}: the steps of a pipeline write to different directories.",
            "Set run=<name> or paths.root=<directory>.",
        )


def check_ranks(configs: dict[str, DictConfig]) -> None:
    """Reject steps that run on a different number of processes from the first one.

    Raises:
        ConfigError: A step overrides the processes that all steps share.
    """
    first, *others = configs.items()
    for step, config in others:
        for key in ("strategy", "devices", "num_nodes"):
            expected, found = first[1].trainer[key], config.trainer[key]
            if found != expected:
                raise ConfigError(
                    f"pipeline.overrides.{step} sets trainer.{key}={found}, but step {first[0]} has {expected}: all "
                    "steps of a pipeline run on the same processes.",
                    f"Set trainer.{key}={expected} for all steps, or run step {step} by its own command.",
                )


def check_inputs(configs: dict[str, DictConfig]) -> None:
    """Reject a step with an input that does not exist and that no earlier step makes.

    Raises:
        ConfigError: There is no such input.
    """
    planned: list[Path] = []
    for config in configs.values():
        for key in required_inputs(config)[1]:
            chosen = input_path(config, key, planned)
            for path in chosen if OmegaConf.is_list(chosen) else [chosen]:
                if path is not None and not _is_planned(Path(path), planned):
                    open_model_source(str(path))
        if models := config.stage.get("models"):  # of stage=evaluate
            run = Path(config.paths.run)
            missing = {
                name: path
                for name, path in named(models).items()
                if not (_is_planned(run / path, planned) or _is_planned(Path(path), planned))
            }
            if missing:
                open_policies(config, missing, key="stage.models")
        if not (config.trainer.fast_dev_run or config.check == "only"):
            planned.append(Path(config.paths.output).absolute())


def _is_planned(path: Path, planned: list[Path]) -> bool:
    return any(path.absolute().is_relative_to(directory) for directory in planned)


def step_overrides(cfg: DictConfig, step: str, directory: Path, of_round: Sequence[str] = ()) -> list[str]:
    """Return the overrides of one step: those of the command line, followed by ``pipeline.overrides.<step>``.

    Args:
        cfg: The configuration of the pipeline.
        step: A stage or a variant.
        directory: Directory of the run, or of this job of a sweep.
        of_round: Overrides of a step of a round.
    """
    typed = [override for override in HydraConfig.get().overrides.task if _key(override) != "stage"]
    shared = [override for override in typed if not _key(override).startswith("pipeline.")]
    variant = cfg.pipeline.variants.get(step)
    chosen = [f"stage={step}"] if variant is None else [*variant, f"paths.output={quote(directory / step)}"]
    own = list(cfg.pipeline.overrides.get(step, []))
    of_run = [] if directory == Path(cfg.paths.run) else [f"paths.run={quote(directory)}"]
    return [*chosen, *shared, *of_run, *of_round, *own]


def step_config(overrides: list[str]) -> DictConfig:
    """Compose the configuration of one step from its overrides."""
    config = compose("config", overrides=overrides)
    resolve_trainer(config)
    return config


def output_table(directory: Path, configs: dict[str, DictConfig], seconds: dict[str, float]) -> Table:
    """Return a table of the files that each step has written and of the time that it took."""
    table = Table(title=f"Outputs; {sum(seconds.values()):.0f} s in total")
    for title in ("step", "seconds", "files"):
        table.add_column(title, justify="right" if title == "seconds" else "left", overflow="fold")
    rows: list[tuple[str, str, str]] = []
    for step, config in configs.items():
        output = Path(config.paths.output)
        names = (stages()[config.stage_name].final or "metrics.json", "samples.jsonl", f"{config.stage_name}.log")
        files = [output / name for name in names if (output / name).is_file()]
        rows.append((step, f"{seconds[step]:.0f}", "\n".join(map(str, files))))
    if (final := directory / FINAL_MODEL).is_file():
        rows.append(("result", "", f"{final}   ({load_call(final)})"))
    if (report := directory / REPORT).is_file():
        rows.append(("report", "", str(report)))
    rows.append(("curves", "", f"tensorboard --logdir {shlex.quote(str(directory))}"))
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


def _is_sweep(cfg: DictConfig) -> bool:
    """Return whether Hydra has given this job of a multirun its own output directory."""
    return Path(cfg.paths.output) != Path(cfg.paths.run) / "pipeline"
