"""One job of a sweep: what it returns, and what it leaves for the table."""

import json
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import Stopped, exit_code_of, explain
from rlhf.files import write_json
from rlhf.process.launch import rank_in_environment

FILE = "job.json"
log = logging.getLogger(__name__)
ended: "dict[Path, Job]" = {}  # the jobs of the current sweep that have ended in this process, by directory


class Monitored(float):
    """The metric that ``train.py`` returns.

    Args:
        value: The value; NaN if there is none.
        name: Its name, such as ``val/loss``.
    """

    name: str

    def __new__(cls, value: float, name: str = "") -> "Monitored":
        """Return the value as a number that has a name."""
        monitored = super().__new__(cls, value)
        monitored.name = name
        return monitored

    def __reduce__(self) -> Any:
        """Return what a copy is made of."""
        return Monitored, (float(self), self.name)


@dataclass(frozen=True)
class Job:
    """What ``job.json`` contains.

    Args:
        overrides: The overrides of the job.
        metric: Name of the monitored metric; empty if there is none.
        value: Its value; None if there is none, or if the job has failed.
        seconds: How long the job took.
        error: Why it has failed; empty if it has not.
        exit_code: Exit code of the same command outside a sweep.
    """

    overrides: list[str]
    metric: str = ""
    value: float | None = None
    seconds: float = 0.0
    error: str = ""
    exit_code: int = 0

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is a loss."""
        return self.metric.rpartition("/")[2] == "loss"

    @classmethod
    def read(cls, path: Path) -> "Job | None":
        """Return the content of a file; None if it has another form."""
        try:
            content: Any = json.loads(path.read_bytes())
            return cls(**content)
        except (OSError, ValueError, TypeError):
            return None


def run_job(run: Callable[[], float], directory: Path, overrides: Sequence[str]) -> float:
    """Run a job of a sweep. If it fails, the error is shown, and the sweep goes on.

    Args:
        run: Runs the job and returns its metric.
        directory: Directory of the job.
        overrides: Its overrides.

    Returns:
        The metric; NaN if the job has failed.

    Raises:
        Stopped: A signal ends the whole sweep.
    """
    started = time.perf_counter()
    error, code = "", 0
    metric: float = math.nan
    try:
        metric = run()
    except Stopped:
        raise
    except SystemExit as exception:  # of a command, such as stage=doctor, that has found errors
        code = exception.code if isinstance(exception.code, int) else 1
        error = f"exit code {code}"
    except Exception as exception:
        message = explain(exception)
        error, code = message or f"{type(exception).__name__}: {exception}", exit_code_of(exception)
        sys.stderr.write(f"{message or traceback.format_exc()}\n")
        log.error("The job %s has failed. The sweep goes on.", directory.name)
    if rank_in_environment() == 0:
        value = None if math.isnan(metric) else float(metric)
        job = Job(
            list(overrides), getattr(metric, "name", ""), value, time.perf_counter() - started, error.strip(), code
        )
        ended[directory] = job
        write_json(directory / FILE, asdict(job))
    return metric
