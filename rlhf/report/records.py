"""What a run has written, gathered for its report. A missing or damaged file becomes a problem, not an error."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf.files import FINAL_MODEL, LOCK
from rlhf.report.events import Alert, Curve, TextLog, find_alerts, read_events, read_text_log
from rlhf.runs.provenance import read_provenance
from rlhf.runs.scan import StageDirectory, read_config, scan_run, stage_directories

NAMED_FILES = ("metrics.json", "samples.jsonl")


@dataclass(frozen=True)
class FileSize:
    """A file of a run: its path relative to the run, and its size in bytes."""

    name: str
    size: int


@dataclass
class StageRecord:
    """What one stage has written.

    Args:
        name: Directory of the stage in the run, such as ``ppo``, ``round_1/dpo``, or the name of a variant.
        stage: The stage, such as ``grpo``.
        path: The directory.
        state: As in ``stage=runs``.
        metric: Main metric, as text.
        modified: Time of the newest file, in seconds since the epoch.
        files: Result, metrics, samples, logs and checkpoints.
        curves: Logged metrics by name.
        alerts: Alerts that have fired.
        log: The text log.
        metrics: Content of metrics.json; empty if there is none.
        config: The configuration.
        overrides: Overrides of the command line; None if they were not stored.
        provenance: How the result was made; empty if there is none.
        problems: What is missing or cannot be read.
    """

    name: str
    stage: str
    path: Path
    state: str = ""
    metric: str = ""
    modified: float = 0.0
    files: list[FileSize] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    alerts: list[Alert] = field(default_factory=list)
    log: TextLog = field(default_factory=TextLog)
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass
class RunRecord:
    """A run, or a job of a sweep.

    Args:
        name: Name in the report.
        path: Directory.
        stages: Its stages in order.
        files: Files that belong to no stage.
        overrides: Overrides of the pipeline; None if no pipeline was run.
        problems: What is missing.
    """

    name: str
    path: Path
    stages: list[StageRecord] = field(default_factory=list)
    files: list[FileSize] = field(default_factory=list)
    overrides: list[str] | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def is_one_stage(self) -> bool:
        """Whether the directory is that of a stage, as for a job of a sweep over one stage."""
        return len(self.stages) == 1 and self.stages[0].path == self.path

    def of_stage(self, stage: str) -> list[StageRecord]:
        """Return the records of a stage, variants of the pipeline among them."""
        return [record for record in self.stages if record.stage == stage]

    @property
    def evaluation(self) -> StageRecord | None:
        """The last complete record of ``stage=evaluate``, if it was run. That of the last round compares all rounds."""
        found = self.of_stage("evaluate")
        complete = [record for record in found if record.metrics]
        return next(reversed(complete or found), None)


def read_run(path: Path, name: str) -> RunRecord:
    """Read what a run, or a job of a sweep, has written."""
    run = RunRecord(name, path, overrides=_overrides(path / "pipeline", []))
    states = {summary.name: summary for summary in scan_run(path)}
    for directory in stage_directories(path):
        record = read_stage(directory, path)
        if (summary := states.get(record.name)) is not None:
            record.state, record.metric, record.modified = summary.state, summary.metric, summary.modified
        run.stages.append(record)
    if (path / FINAL_MODEL).is_file():
        run.files.append(FileSize(FINAL_MODEL, (path / FINAL_MODEL).stat().st_size))
    _note_missing(run)
    return run


def read_stage(directory: StageDirectory, run: Path) -> StageRecord:
    """Read what one stage has written.

    Args:
        directory: The stage and its directory.
        run: Directory of the run, which file names are relative to.
    """
    path, info = directory.path, directory.info
    record = StageRecord(directory.name, info.name, path)
    record.files = _files(directory, run)
    record.log = read_text_log(path / f"{info.name}.log")
    record.curves, problems = read_events(path / "tensorboard")
    record.problems += problems
    if not record.curves and record.log.curves and info.exports:
        record.curves = record.log.curves
        record.problems.append("There are no readable event files. Curves come from the text log, with six digits.")
    record.alerts = find_alerts(record.curves, record.log)
    record.metrics = _read_json(path / "metrics.json", record.problems)
    try:
        record.config = read_config(path)
    except (OSError, ValueError) as error:
        record.problems.append(f"The configuration cannot be read: {error}")
    record.overrides = _overrides(path, record.problems)
    if info.final and (path / info.final).suffix == ".pt" and (path / info.final).is_file():
        try:
            record.provenance = read_provenance(path / info.final)
        except (OSError, ValueError):
            record.problems.append(f"{path / info.final} is damaged, or describes no provenance.")
    return record


def _files(directory: StageDirectory, run: Path) -> list[FileSize]:
    """Return the files of a stage that a reader may look for, results first."""
    path, info = directory.path, directory.info
    names = [*([info.final] if info.final else []), *NAMED_FILES, f"{info.name}.log"]
    unscored = sorted(path.glob("unscored_samples*.jsonl"))
    of_stage = [path / name for name in dict.fromkeys(names)] + unscored + directory.checkpoints
    events = sorted(path.glob("tensorboard/*/events.out.tfevents.*"))
    found = [FileSize(item.relative_to(run).as_posix(), _size(item)) for item in of_stage if item.exists()]
    if events:
        found.append(FileSize((path / "tensorboard").relative_to(run).as_posix() + "/", sum(map(_size, events))))
    return found


def _size(path: Path) -> int:
    """Return the size of a file, or of the files of a checkpoint that is a directory, in bytes."""
    files = [item for item in path.rglob("*") if item.is_file() and item.name != LOCK] if path.is_dir() else [path]
    return sum(item.stat().st_size for item in files)


def _note_missing(run: RunRecord) -> None:
    """Add what a complete run has and this one does not."""
    names = {record.stage for record in run.stages}
    if not run.stages:
        run.problems.append("No stage has been started.")
        return
    if run.is_one_stage:
        return
    if "evaluate" not in names:
        run.problems.append("There is no evaluation, so win rates and responses are missing.")
    if "reward" not in names:
        run.problems.append("There is no reward model of this run, so its calibration and length bias are missing.")
    for record in run.stages:
        if not record.state.startswith("finished"):
            run.problems.append(f"{record.name} has not finished: {record.state}.")
        run.problems += [f"{record.name}: {problem}" for problem in record.problems]


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """Return the content of a JSON file; empty if it is missing or damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        problems.append(f"{path} is damaged: it is not complete JSON.")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path} is damaged: it is not a JSON object.")
        return {}
    return found


def _overrides(directory: Path, problems: list[str]) -> list[str] | None:
    """Return the overrides that Hydra has stored for a stage or a pipeline; None if there are none stored."""
    path = directory / ".hydra" / "overrides.yaml"
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        problems.append(f"{path} is not YAML.")
        return None
    return [str(override) for override in found] if isinstance(found, list) else None
