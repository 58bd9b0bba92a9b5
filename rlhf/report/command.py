"""``stage=report``: write the report of a run, or of several runs or the jobs of a sweep."""

import logging
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from rlhf.errors import ConfigError
from rlhf.printable import printable
from rlhf.run_names import check_run_name, command_in_run
from rlhf.runs.scan import stage_directories, subdirectories
from rlhf.schema import PositiveInt

log = logging.getLogger(__name__)
NAME = "report.html"
COMPARISON = "comparison.html"


def write_report(
    cfg: DictConfig,
    *,
    runs: Sequence[str] | None = None,
    sweep: str | None = None,
    output: str | None = None,
    max_prompts: PositiveInt = 500,
) -> int:
    """Write a report as one HTML file that opens without a network.

    Args:
        cfg: The composed configuration. Without ``runs`` and ``sweep``, the report is that of ``run``.
        runs: Names of runs in ``paths.root`` to compare. null shows one run.
        sweep: A sweep whose jobs to compare: the name of its stage, such as ``dpo`` for
            ``outputs/<run>/sweeps/dpo``, or a directory with one directory per job.
        output: File to write. null writes ``report.html`` in the directory of the run or of the sweep, or
            ``comparison.html`` in ``paths.root``.
        max_prompts: Largest number of prompts whose responses are shown.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: There is no such run or sweep.
    """
    if runs is not None and sweep is not None:
        raise ConfigError("command.runs and command.sweep exclude each other.", "Remove command.sweep.")
    root = Path(cfg.paths.root)
    if runs is None and sweep is None:
        path = _run_directory(root, Path(cfg.paths.run), f"run={cfg.run}")
        target = Path(output) if output is not None else path / NAME
        write_run_report(path, str(cfg.run), target, max_prompts)
    elif sweep is not None:
        directory = _sweep_directory(Path(cfg.paths.run), sweep)
        target = Path(output) if output is not None else directory / NAME
        jobs = {job.name: job for job in subdirectories(directory)}
        _write_comparison(f"sweep {directory.name} of {cfg.run}", jobs, target)
    else:
        chosen = {str(name): _chosen_run(root, str(name)) for name in runs or ()}
        if len(chosen) < 2:
            raise ConfigError(
                f"command.runs must name at least two runs, got [{', '.join(chosen)}].", "For one run: run=<name>"
            )
        target = Path(output) if output is not None else root / COMPARISON
        _write_comparison(", ".join(chosen), chosen, target)
    log.info("saved %s (%.1f MB)", printable(str(target)), target.stat().st_size / 1e6)
    return 0


def write_run_report(path: Path, name: str, target: Path, max_prompts: int = 500) -> None:
    """Write the report of one run.

    Args:
        path: Directory of the run.
        name: Its name in the report.
        target: File to write.
        max_prompts: Largest number of prompts whose responses are shown.
    """
    # Imported here because they load matplotlib and TensorBoard, which other commands and training do not need.
    from rlhf.report.page import write_page
    from rlhf.report.records import read_run
    from rlhf.report.run_page import run_content

    write_page(target, "run.html", run_content(read_run(path, name), max_prompts))


def _write_comparison(title: str, paths: dict[str, Path], target: Path) -> None:
    from rlhf.report.comparison import comparison_content
    from rlhf.report.page import write_page
    from rlhf.report.records import read_run

    records = [read_run(path, name) for name, path in paths.items()]
    write_page(target, "comparison.html", comparison_content(title, records))


def _chosen_run(root: Path, name: str) -> Path:
    check_run_name(name)
    return _run_directory(root, root / name, "command.runs")


def _run_directory(root: Path, path: Path, key: str) -> Path:
    """Return the directory of a run.

    Raises:
        ConfigError: There is none, or no stage has been started in it.
    """
    if path.is_dir() and stage_directories(path):
        return path
    known = [entry.name for entry in subdirectories(root) if stage_directories(entry)]
    listed = ", ".join(map(printable, known)) or "none"
    reason = "it contains no stage" if path.is_dir() else "there is no such run"
    fix = "Choose one of these." if known else f"Run {printable(command_in_run(path))}"
    raise ConfigError(f"{key}: {reason} ({printable(str(path))}). Runs in {printable(str(root))}: {listed}.", fix)


def _sweep_directory(run: Path, sweep: str) -> Path:
    """Return the directory of a sweep.

    Raises:
        ConfigError: There is none, or it has no job.
    """
    for path in (run / "sweeps" / sweep, Path(sweep)):
        if path.is_dir() and any(stage_directories(job) for job in subdirectories(path)):
            return path
    known = [path.name for path in subdirectories(run / "sweeps")]
    raise ConfigError(
        f"command.sweep={printable(sweep)}: there is no such sweep of {printable(str(run))}. "
        f"Sweeps: {', '.join(map(printable, known)) or 'none'}.",
        "Set command.sweep=<stage> or command.sweep=<directory of a sweep>.",
    )
