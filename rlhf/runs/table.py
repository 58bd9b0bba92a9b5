"""The table of ``stage=runs``."""

import time
from pathlib import Path

from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.errors import ConfigError
from rlhf.printable import printable
from rlhf.runs.scan import StageSummary, scan_run, subdirectories

UNITS = {"d": 86400, "h": 3600, "min": 60}  # seconds
STYLES = {"finished": "green", "running": "cyan", "killed": "yellow", "no checkpoint": "yellow", "unreadable": "red"}


def list_runs(cfg: DictConfig, *, sweeps: bool = False) -> int:
    """Print a table of the runs in ``paths.root``, the one that was changed last first.

    Args:
        cfg: The composed configuration.
        sweeps: Also list each job of the sweeps of a run, as ``<run>/sweeps/<stage>/<job>``.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: ``paths.root`` is not a directory.
    """
    root = Path(cfg.paths.root)
    if not root.is_dir():
        raise ConfigError(f"paths.root={root}: there is no such directory.", "Set paths.root=<directory of the runs>")
    runs = scan_runs(root, sweeps=sweeps)
    console = Console()
    if runs:
        console.print(runs_table(root, runs, time.time()))
    else:
        console.print(Text(f"There are no runs in {printable(str(root))}."))
    if hidden := 0 if sweeps else sum(len(sweep_jobs(run)) for run in subdirectories(root)):
        console.print(f"Jobs of sweeps that are not shown: {hidden}. To list them: command.sweeps=true")
    return 0


def scan_runs(root: Path, *, sweeps: bool = False) -> dict[str, list[StageSummary]]:
    """Return the stages of every run by its name, the run that was changed last first.

    Args:
        root: Directory of the runs.
        sweeps: Whether jobs of sweeps count as runs.
    """
    paths = subdirectories(root)
    jobs = [job for run in paths for job in sweep_jobs(run)] if sweeps else []
    found = {path.relative_to(root).as_posix(): scan_run(path) for path in [*paths, *jobs]}
    started = {name: summaries for name, summaries in found.items() if summaries}
    return dict(sorted(started.items(), key=lambda item: -max(summary.modified for summary in item[1])))


def sweep_jobs(run: Path) -> list[Path]:
    """Return the directories of the jobs of all sweeps of a run."""
    return [job for sweep in subdirectories(run / "sweeps") for job in subdirectories(sweep)]


def runs_table(root: Path, runs: dict[str, list[StageSummary]], now: float) -> Table:
    """Build the table.

    Args:
        root: Directory of the runs, for the title.
        runs: The stages of each run by its name.
        now: Seconds since the epoch, to which ages refer.
    """
    title = Text(f"Runs in {printable(str(root))}")
    table = Table(title=title, caption=_caption(runs), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("run", "stage", "state", "metric", "age", "base model"):
        table.add_column(column, overflow="fold", justify="right" if column == "age" else "left")
    for name, summaries in runs.items():
        for number, summary in enumerate(summaries):
            table.add_row(
                Text(printable(name) if number == 0 else ""),
                Text(printable(summary.name)),
                Text(summary.state, style=_style(summary.state)),
                Text(printable(summary.metric)),
                Text(age(now - summary.modified), no_wrap=True),
                Text(printable(summary.base_model)),
                end_section=number == len(summaries) - 1,
            )
    return table


def age(seconds: float) -> str:
    """Return a duration in its largest unit, such as ``5 min``."""
    for unit, length in UNITS.items():
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _style(state: str) -> str:
    if "stale" in state:
        return "yellow"
    return next((style for start, style in STYLES.items() if state.startswith(start)), "")


def _caption(runs: dict[str, list[StageSummary]]) -> str | None:
    """Return how to continue the first run that was killed; None if none was."""
    killed = ((run, stage.name) for run, stages in runs.items() for stage in stages if stage.state.startswith("killed"))
    return "Repeat the command of a killed stage with resume=true to continue it." if next(killed, None) else None
