"""The table of a sweep, best job first."""

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from rlhf.printable import printable
from rlhf.stages import stages
from rlhf.sweep.job import FILE, Job

ERROR_LENGTH = 200  # characters


def read_jobs(directory: Path, since: float = 0.0, ended: Mapping[Path, Job] = MappingProxyType({})) -> dict[Path, Job]:
    """Return the jobs of a sweep by their directory, the best one first and failed ones last.

    Args:
        directory: Directory of the sweep.
        since: Jobs that ended before this time, in seconds since the epoch, belong to an earlier sweep.
        ended: Jobs that are known to have ended. Those of a sweep over ``run`` or ``stage`` have other directories.
    """
    files = [path for path in sorted(directory.glob(f"*/{FILE}")) if path.stat().st_mtime >= since]
    found = {path.parent: job for path in files if (job := Job.read(path)) is not None}
    known = {path.absolute() for path in found}
    found |= {path: job for path, job in ended.items() if path.absolute() not in known}
    return dict(sorted(found.items(), key=lambda item: _rank(item[1])))


def swept_keys(jobs: Mapping[Path, Job]) -> dict[str, list[str]]:
    """Return the keys in which jobs differ, with the value of each job."""
    values = [dict(override.split("=", 1) for override in job.overrides if "=" in override) for job in jobs.values()]
    keys = dict.fromkeys(key for own in values for key in own)
    rows = {key: [own.get(key, "") for own in values] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def sweep_table(jobs: Mapping[Path, Job]) -> Table:
    """Build the table for the terminal, with the jobs in their order."""
    keys = swept_keys(jobs)
    names = {job.metric for job in jobs.values() if job.metric}
    metric = names.pop() if len(names) == 1 else "metric"
    title = Text(f"Jobs of the sweep in {printable(str(common_directory(jobs)))}, the best one first")
    caption = "The directories of the jobs are in sweep.json."
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in (*keys, metric, "seconds"):
        numeric = column in (metric, "seconds")
        table.add_column(
            Text(printable(column)), justify="right" if numeric else "left", overflow="fold", no_wrap=numeric
        )
    for number, job in enumerate(jobs.values()):
        shown = "failed" if job.error else "none" if job.value is None else f"{job.value:.4f}"
        cells = [printable(_rounded(row[number])) for row in keys.values()]
        table.add_row(*map(Text, [*cells, shown, f"{job.seconds:.0f}"]))
    return table


def failures(jobs: Mapping[Path, Job]) -> list[str]:
    """Return one line for each failed job: its directory, and the first line of its error."""
    return [
        f"{path.name}: {printable(job.error.splitlines()[0], ERROR_LENGTH)}" for path, job in jobs.items() if job.error
    ]


def common_directory(jobs: Mapping[Path, Job]) -> Path:
    """Return the innermost directory that contains the directories of all jobs."""
    directory = Path(os.path.commonpath([path.absolute().parent for path in jobs]))
    return directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory


def commands(jobs: Mapping[Path, Job]) -> list[str]:
    """Return commands that open the result of the first job, which is the best one, and the curves of all jobs."""
    found = []
    names = [info.final for info in stages().values() if info.exports == "policy"]
    if models := [path for name in names for path in sorted(next(iter(jobs)).rglob(str(name)))]:
        code = f"from rlhf import load_model; model, tokenizer, device = load_model({json.dumps(str(models[-1]))})"
        found.append(f"python -c {shlex.quote(code)}")
    return [*found, f"tensorboard --logdir {shlex.quote(str(common_directory(jobs)))}"]


def content(directory: Path, jobs: Mapping[Path, Job]) -> dict[str, Any]:
    """Return what ``sweep.json`` in a directory contains: every job in the order of the table."""
    return {
        "jobs": [
            {
                "directory": os.path.relpath(path, directory),
                "overrides": job.overrides,
                "metric": job.metric,
                "value": job.value,
                "seconds": round(job.seconds, 1),
                "error": job.error,
            }
            for path, job in jobs.items()
        ]
    }


def _rounded(value: str) -> str:
    """Return a number that a sweeper has drawn with four digits, and other values as they are."""
    return f"{float(value):.4g}" if re.fullmatch(r"-?\d+\.\d{5,}(e[-+]?\d+)?", value) else value


def _rank(job: Job) -> tuple[bool, bool, float]:
    value = job.value if job.value is not None else 0.0
    return bool(job.error), job.value is None, value if job.lower_is_better else -value
