"""Training curves of a stage: which metrics belong into one plot, and in which order the plots come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlhf.metrics.alert_rules import RULES
from rlhf.report.events import Alert, Curve
from rlhf.report.figures import Line, Plot
from rlhf.report.plots import curves_plot
from rlhf.report.records import StageRecord
from rlhf.report.tables import Cell, Table, code, number

HIDDEN = ("alerts/", "final/", "report/", "throughput/")  # prefixes of metrics without a plot
NO_PLOT = ("epoch",)
# Training metric -> the metric of validation that measures the same.
VALIDATION = {
    "objective/scores": "val/score",
    "objective/kl": "val/kl",
    "response/length": "val/length",
    "response/truncated": "val/truncated",
}
# Metrics that are shown first; the other ones are folded.
PREFERRED = (
    *("train/loss", "objective/scores", "objective/kl", "rewards/margins", "rewards/accuracies"),
    *("train/accuracy", "train/margin", "train/token_accuracy", "train/entropy", "response/length"),
    *("policy/entropy_avg", "critic/explained_variance", "grad_norm", "lr"),
)
SHOWN = 6  # plots that are not folded
TRAINING_COLOR, VALIDATION_COLOR = 0, 1


@dataclass(frozen=True)
class StageCurves:
    """The training curves of one stage.

    Args:
        record: The stage.
        shown: Plots of the main metrics and of those whose alert has fired.
        folded: The other plots.
        values: The last value of every metric.
        alerts: Alerts that have fired.
    """

    record: StageRecord
    shown: list[Plot]
    folded: list[Plot]
    values: Table
    alerts: list[Alert] = field(default_factory=list)


def stage_curves(record: StageRecord) -> StageCurves:
    """Draw the curves of a stage."""
    groups = metric_groups(record.curves)
    fired = {_watched(alert) for alert in record.alerts}
    preferred = [name for name in PREFERRED if name in groups]
    main = [name for name in groups if name in fired and name not in preferred[:SHOWN]]
    main = [*preferred[:SHOWN], *main] or list(groups)[:SHOWN]
    plots = {name: _plot(record, name, names) for name, names in groups.items()}
    folded = [plot for name, plot in plots.items() if name not in main]
    return StageCurves(record, [plots[name] for name in main], folded, last_values(record), record.alerts)


def metric_groups(curves: Mapping[str, Curve]) -> dict[str, list[str]]:
    """Return the metrics of each plot by the first of them: a metric of training, and the same one of validation.

    A metric of which there is a single value has no plot, unless it belongs to a metric with more values.
    """
    drawn = [name for name in curves if not name.startswith(HIDDEN) and name not in NO_PLOT]
    groups: dict[str, list[str]] = {}
    for name in drawn:
        if name.startswith("val/"):
            continue
        partner = VALIDATION.get(name, f"val/{name.removeprefix('train/')}")
        groups[name] = [name, partner] if partner in curves else [name]
    taken = {name for names in groups.values() for name in names}
    groups |= {name: [name] for name in drawn if name not in taken}
    return {first: names for first, names in groups.items() if any(len(curves[name].steps) > 1 for name in names)}


def _watched(alert: Alert) -> str | None:
    """Return the metric that an alert compares with its threshold; None for an alert of another version."""
    return RULES[alert.name].metrics[0] if alert.name in RULES else None


def _plot(record: StageRecord, title: str, names: Sequence[str]) -> Plot:
    lines = [
        Line(
            "validation" if name.startswith("val/") else "training",
            record.curves[name].steps,
            record.curves[name].values,
            VALIDATION_COLOR if name.startswith("val/") else TRAINING_COLOR,
        )
        for name in names
    ]
    alerts = [alert for alert in record.alerts if _watched(alert) in names]
    return curves_plot(f"curve-{identifier(record.name)}-{identifier(title)}", title, lines, alerts)


def last_values(record: StageRecord) -> Table:
    """Return the table of the last value of every metric, with its step."""
    rows: list[list[Cell]] = [
        [code(name), number(curve.last), number(curve.steps[-1]), number(len(curve.steps))]
        for name, curve in sorted(record.curves.items())
        if not name.startswith(("alerts/", "final/")) and name not in NO_PLOT
    ]
    return Table(["metric", "last value", "step", "values logged"], rows, f"values-{identifier(record.name)}")


def identifier(name: str) -> str:
    """Return a name as a part of an identifier of HTML; different names have different results."""
    return "".join(char if char.isascii() and char.isalnum() else f"_{ord(char):x}" for char in name)
