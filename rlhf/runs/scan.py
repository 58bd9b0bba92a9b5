"""What the stages of a run have reached, from the files that they have written. Nothing here imports torch."""

import json
import os
import re
import zipfile
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from rlhf.files import LAST, LOCK, METADATA, PREVIOUS, is_locked
from rlhf.metrics.evaluation_names import SCORERS, TARGET, WIN_RATE
from rlhf.runs.checkpoints import checkpoint_step
from rlhf.runs.provenance import read_provenance
from rlhf.stages import StageInfo, stages

UNREADABLE = "unreadable"
LOG_BYTES = 1 << 16  # the end of a log that is read
EVALUATION = "evaluation"  # directory of stage=evaluate
ROUND = re.compile(r"round_\d+")  # directory of a round of the pipeline


@dataclass(frozen=True)
class StageSummary:
    """One row of the table.

    Args:
        name: Directory of the stage in its run, such as ``ppo`` or ``round_1/dpo``; a variant of the pipeline has its
            own name.
        state: ``finished``, ``running``, ``killed at step N``, ``no checkpoint`` or ``unreadable``.
        metric: The main metric, as text.
        base_model: The base model that the stage was configured with, as text.
        modified: Time of the newest file, in seconds since the epoch.
    """

    name: str
    state: str
    metric: str
    base_model: str
    modified: float


@dataclass(frozen=True)
class StageDirectory:
    """The directory of one stage in a run, or of one job of a sweep.

    Args:
        path: The directory.
        info: The stage that has written it.
        name: The directory in its run.
    """

    path: Path
    info: StageInfo
    name: str

    @property
    def result(self) -> Path:
        """The file that the stage writes last."""
        return self.path / (self.info.final or "metrics.json")

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints that exist, the newest one first: files, or directories with ``trainer=fsdp``."""
        paths = (self.path / "checkpoints" / name for name in (LAST, PREVIOUS))
        return [path for path in paths if path.exists()]

    def summary(self) -> StageSummary:
        """Describe the stage. A file that cannot be read makes one entry ``unreadable``."""
        return StageSummary(
            self.name,
            _readable(self._state),
            _readable(self._metric),
            _readable(self._base_model),
            self._modified(),
        )

    def _state(self) -> str:
        if is_locked(self.path / LOCK):
            steps = re.findall(r" step=(\d+) ", self._log)
            return f"running, step {steps[-1]}" if steps else "running"
        if self.result.is_file() and self._is_newest(self.result):
            is_complete = self.result.suffix != ".pt" or zipfile.is_zipfile(self.result)
            return "finished" if is_complete else UNREADABLE
        steps = [_readable(partial(checkpoint_step, path)) for path in self.checkpoints]
        readable = [f"killed at step {step}" for step in steps if step != UNREADABLE]
        return next(iter(readable), UNREADABLE if steps else "no checkpoint")

    def _is_newest(self, result: Path) -> bool:
        """Return whether no checkpoint is of a later training. The times of copied files may be in another order."""
        if all(_time(path) <= _time(result) for path in self.checkpoints):
            return True
        try:
            final = int(read_provenance(result).get("step", -1))
            return all(checkpoint_step(path) <= final for path in self.checkpoints)
        except (OSError, ValueError, TypeError):
            return False

    def _metric(self) -> str:
        """Return the accuracy or the win rates in metrics.json, or else the last monitored metric in the log."""
        path = self.path / "metrics.json"
        metrics = json.loads(path.read_bytes()) if path.is_file() else {}
        if "models" in metrics:
            return _win_rates(metrics["models"])
        if "accuracy" in metrics:
            return f"accuracy {metrics['accuracy']:.3f}"
        monitored = re.findall(r" INFO (\S+) = (-?[\d.]+)$", self._log, flags=re.M)
        return " ".join(monitored[-1]) if monitored else ""

    def _base_model(self) -> str:
        config = read_config(self.path)
        model = config.get("model") or {}
        name = str(model.get("path") or str(model.get("_target_", "")).rpartition(".")[2].lower())
        return f"{name} + adapter" if config.get("adapter") else name

    @cached_property
    def _log(self) -> str:
        path = self.path / f"{self.info.name}.log"
        if not path.is_file():
            return ""
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            return file.read().decode(errors="replace")

    def _modified(self) -> float:
        files = [Path(folder, name) for folder, _, names in os.walk(self.path) for name in names if name != LOCK]
        return max(map(_time, [self.path / ".hydra", *files]))


def scan_run(run: Path) -> list[StageSummary]:
    """Describe every stage that a run, or a job of a sweep, has started, in the order of the stages."""
    directories = stage_directories(run)
    stale = stale_stages(run)
    found = []
    for directory in directories:
        summary = directory.summary()
        if made_by := stale.get(directory.name):
            summary = replace(summary, state=f"{summary.state}; stale, {made_by} was trained again")
        found.append(summary)
    return found


def stage_directories(run: Path) -> list[StageDirectory]:
    """Return the directory of every stage that a run has started: first the stages in their order, then each round."""
    if (own := stage_of(run)) is not None:  # a job of a sweep over one stage
        return [StageDirectory(run, own, run.name)]
    rounds = sorted((path for path in subdirectories(run) if ROUND.fullmatch(path.name)), key=_round_number)
    found = []
    for parent in (run, *rounds):
        started = [(path, info) for path in subdirectories(parent) if (info := stage_of(path)) is not None]
        found += sorted(started, key=lambda pair: (pair[1].position, pair[0].name))
    return [StageDirectory(path, info, path.relative_to(run).as_posix()) for path, info in found]


def _round_number(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def stage_of(directory: Path) -> StageInfo | None:
    """Return the stage that has written a directory; None if no stage has."""
    try:
        name = read_config(directory).get("stage_name")
    except (OSError, ValueError):
        name = {EVALUATION: "evaluate"}.get(directory.name, directory.name)
        name = name if (directory / ".hydra").is_dir() else None
    of_file = (info.name for info in stages().values() if info.final and (directory / info.final).is_file())
    return stages().get(str(name if name is not None else next(of_file, None)))


def read_config(directory: Path) -> dict[str, Any]:
    """Return the configuration that Hydra has stored for a stage; empty if there is none.

    Raises:
        ValueError: The file is not a configuration.
        OSError: The file cannot be read.
    """
    path = directory / ".hydra" / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a configuration.")
    return config


def stale_stages(run: Path) -> dict[str, str]:
    """Return the stages of a run whose input has been trained again since, and the stage that has made the input.

    Weights are compared, which imports torch, only where the file of the input is newer than the result. An evaluation
    is stale if the file of a policy that it compares is newer.
    """
    results = {info.name: run / info.name / str(info.final) for info in stages().values() if info.final}
    stale = _stale_evaluation(run, results)
    inputs = [(name, made_by) for name in results for made_by in stages()[name].inputs.values() if made_by in results]
    if not any(_time(results[made_by]) > _time(results[name]) > 0 for name, made_by in inputs):
        return stale
    from rlhf.lineage import outdated_stages

    try:
        return stale | outdated_stages(run)
    except Exception:  # A damaged export raises one of many types. Its own row says what is wrong.
        return stale


def _stale_evaluation(run: Path, results: dict[str, Path]) -> dict[str, str]:
    """Return the evaluation of a run and a policy in it that was trained since; nothing if there is none."""
    path = run / EVALUATION / "metrics.json"
    try:
        compared = json.loads(path.read_bytes())["models"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    newer = [name for name in results if name in compared and _time(results[name]) > _time(path)]
    return {EVALUATION: newer[0]} if newer else {}


def subdirectories(path: Path) -> list[Path]:
    """Return the directories in a directory by name; none if it cannot be read."""
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def _readable(describe: Any) -> str:
    """Return a description, or ``unreadable`` if the file that it comes from is damaged or has another format."""
    try:
        return str(describe())
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return UNREADABLE


def _win_rates(models: dict[str, Any]) -> str:
    """Return the win rate of each policy over the baseline, by the gold score or else by the reward model."""
    found: dict[str, list[str]] = {}
    for model, metrics in models.items():
        name = Path(model).parent.name if model.endswith("_final.pt") else model
        for key, rates in metrics.items():
            scorer = next((scorer for scorer in SCORERS if key.startswith(WIN_RATE) and scorer in rates), "")
            other = key.removeprefix(WIN_RATE)
            if scorer and TARGET not in (name, other):
                versus = f"{'RM' if scorer == 'reward' else scorer} wins vs {other}"
                found.setdefault(versus, []).append(f"{name} {rates[scorer]['value']:.2f}")
    return "; ".join(f"{versus}: {', '.join(rates)}" for versus, rates in found.items())


def _time(path: Path) -> float:
    """Return when a file, or a checkpoint that is a directory, was written, in seconds since the epoch; 0 if never."""
    meta = path / METADATA
    try:
        return (meta if meta.is_file() else path).stat().st_mtime
    except OSError:  # A run that is writing removes temporary files.
        return 0.0
