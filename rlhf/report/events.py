"""Metrics and alerts of a stage, from TensorBoard's event files or else from its text log. Nothing imports torch."""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

LINE = re.compile(r"^(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (?P<level>[A-Z]+) (?P<text>.*)$")
ALERT = re.compile(r"alert (\S+) at step (\d+): (.*)")
TOOK = re.compile(r"stage=\S+ took (\d+) s;")
METRIC = re.compile(r"([^\s=]+)=(\S+)")
ALERTS = "alerts/"
MAX_WARNINGS = 20  # distinct warnings that are kept


@dataclass(frozen=True)
class Curve:
    """The values of one metric.

    Args:
        steps: Optimizer steps, ascending.
        values: One value per step, as it was logged.
    """

    steps: list[int]
    values: list[float]

    @property
    def last(self) -> float:
        """The value that was logged last."""
        return self.values[-1]


@dataclass(frozen=True)
class Alert:
    """An alert that has fired.

    Args:
        name: Name of the alert, such as ``kl``.
        start: Step at which it fired.
        end: Last step at which it was active; None if only the text log was read, which does not contain it.
        message: The warning in the log.
    """

    name: str
    start: int
    end: int | None
    message: str


@dataclass
class TextLog:
    """What the text log of a stage contains.

    Args:
        curves: Metrics by name, with six digits.
        alerts: Messages of alerts by name and step.
        warnings: Other warnings and errors, the first of each kind.
        started: Time of the first line; empty if there is none.
        seconds: Duration that the stage has logged last, in seconds; None if it has not ended.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    alerts: dict[tuple[str, int], str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    started: str = ""
    seconds: float | None = None


def read_text_log(path: Path) -> TextLog:
    """Read the text log of a stage; without a file, the result is empty."""
    log, points = TextLog(), dict[str, dict[int, float]]()
    for line in _lines(path):
        if (parsed := LINE.match(line)) is None:
            continue
        text = parsed["text"]
        log.started = log.started or parsed["time"]
        if text.startswith("step="):
            _add_metrics(points, text)
        elif (alert := ALERT.match(text)) is not None:
            log.alerts[alert[1], int(alert[2])] = alert[3]
        elif parsed["level"] in ("WARNING", "ERROR", "CRITICAL"):
            if text not in log.warnings and len(log.warnings) < MAX_WARNINGS:
                log.warnings.append(text)
        elif (took := TOOK.match(text)) is not None:
            log.seconds = float(took[1])
    log.curves = {name: _curve(values) for name, values in points.items()}
    return log


def read_events(directory: Path) -> tuple[dict[str, Curve], list[str]]:
    """Read the scalars in TensorBoard's event files, those of a resumed run among them.

    Args:
        directory: The directory ``tensorboard`` of a stage, with one directory per version.

    Returns:
        Metrics by name, and what could not be read.
    """
    points: dict[str, dict[int, float]] = {}
    problems: list[str] = []
    for version in sorted(directory.glob("version_*"), key=_version):
        try:
            found = _read_version(version)
        except Exception as error:  # A damaged file raises errors of protobuf, TensorBoard or the standard library.
            problems.append(f"The event files in {version} cannot be read ({type(error).__name__}).")
            continue
        # A resumed run repeats the steps since its checkpoint, and overwrite=true repeats all of them. Those of the
        # earlier run do not count.
        first = min((curve.steps[0] for curve in found.values()), default=math.inf)
        points = {name: {step: value for step, value in old.items() if step < first} for name, old in points.items()}
        for name, curve in found.items():
            points[name] = points.get(name, {}) | dict(zip(curve.steps, curve.values, strict=True))
        if not found and any(version.glob("events.out.tfevents.*")):
            problems.append(f"The event files in {version} contain no metric. They may be damaged.")
    return {name: _curve(values) for name, values in points.items() if values}, problems


def find_alerts(curves: Mapping[str, Curve], log: TextLog) -> list[Alert]:
    """Return the alerts that have fired, by step.

    The curves ``alerts/<name>`` are 1 while an alert is active. Without them, the warnings in the text log remain.
    """
    found = [
        Alert(name.removeprefix(ALERTS), start, end, log.alerts.get((name.removeprefix(ALERTS), start), ""))
        for name, curve in curves.items()
        if name.startswith(ALERTS)
        for start, end in _active(curve)
    ]
    seen = {(alert.name, alert.start) for alert in found}
    with_curve = {name.removeprefix(ALERTS) for name in curves if name.startswith(ALERTS)}
    only_logged = [
        Alert(name, step, None, message)
        for (name, step), message in log.alerts.items()
        if (name, step) not in seen and name not in with_curve
    ]
    return sorted([*found, *only_logged], key=lambda alert: (alert.start, alert.name))


def _active(curve: Curve) -> Iterator[tuple[int, int]]:
    """Yield first and last step of every interval in which the values are not zero."""
    start: int | None = None
    last = 0
    for step, value in zip(curve.steps, curve.values, strict=True):
        if value and start is None:
            start = step
        elif not value and start is not None:
            yield start, last
            start = None
        last = step
    if start is not None:
        yield start, last


def _read_version(directory: Path) -> dict[str, Curve]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.CRITICAL)  # It warns of a file that is still being written.
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        scalars = events.Scalars(name)
        found[name] = _curve({event.step: event.value for event in scalars})
    return found


def _add_metrics(points: dict[str, dict[int, float]], text: str) -> None:
    """Add the metrics of a line such as ``step=3 train/loss=0.5``. Lines with other text have none."""
    step, *metrics = [METRIC.fullmatch(word) for word in text.split()]
    if step is None or not step[2].isdigit():
        return
    for metric in metrics:
        if metric is None:
            return
        try:
            points.setdefault(metric[1], {})[int(step[2])] = float(metric[2])
        except ValueError:
            return


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                yield line.rstrip("\n")


def _curve(points: Mapping[int, float]) -> Curve:
    steps = sorted(points)
    return Curve(steps, [float(points[step]) for step in steps])


def _version(path: Path) -> tuple[int, str]:
    number = path.name.removeprefix("version_")
    return (int(number) if number.isdigit() else -1, path.name)


def is_finite(value: object) -> bool:
    """Return whether a value is a number other than NaN and infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
