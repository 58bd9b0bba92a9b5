"""The end of a sweep: its table, ``sweep.json``, and the exit code."""

import time
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from rlhf import run_names
from rlhf.files import write_json
from rlhf.sweep.job import ended

FILE = "sweep.json"
_failed: list[int] = []  # exit codes of the failed jobs of the sweep that has just ended


class SweepTable(Callback):
    """Prints the jobs of a sweep when it ends, the best one first, and writes them to ``sweep.json``."""

    def __init__(self) -> None:
        self.started = time.time()

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.started = time.time()
        _failed.clear()
        ended.clear()
        parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        found = {str(override.key_or_group) for override in parsed if override.is_sweep_override()}
        run_names.swept_keys |= found | set(config.hydra.sweeper.get("params") or ())

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        from rlhf.sweep.table import commands, content, failures, read_jobs, sweep_table

        directory = Path(config.hydra.sweep.dir)
        jobs = read_jobs(directory, self.started, ended)
        if not jobs:
            return
        write_json(directory / FILE, content(directory, jobs))
        console = Console()
        console.print(sweep_table(jobs))
        job = next(iter(jobs.values()))
        if job.value is not None:
            console.print(Text("To open the best result, and the curves of all jobs:"))
            for command in commands(jobs):
                console.print(Text(f"  {command}"), soft_wrap=True)
        _failed.extend(job.exit_code for job in jobs.values() if job.error)
        for line in failures(jobs):
            console.print(Text(f"failed: {line}", style="red"), soft_wrap=True)


def exit_code() -> int:
    """Return the exit code of the sweep that has just ended: 0, or that of the most severe failure of a job.

    A bug, 1, is more severe than a mistake in the configuration, 2.
    """
    return min(_failed, default=0)
