"""The reward model in a report: accuracy, calibration and length bias, from its metrics.json."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.metrics.reward_panels import PANELS, Panel
from rlhf.report.curves import identifier
from rlhf.report.events import is_finite
from rlhf.report.figures import Line, Plot
from rlhf.report.plots import buckets_plot
from rlhf.report.records import StageRecord
from rlhf.report.tables import Table, number, text

# Key in metrics.json -> title. A slash separates levels.
FIGURES = {
    "count": "held-out rows",
    "heads": "heads",
    "accuracy": "accuracy",
    "margin": "mean margin (reward units)",
    "calibration_error": "expected calibration error",
    "longer_chosen/accuracy": "accuracy where the chosen response is longer",
    "longer_chosen/count": "rows where the chosen response is longer",
    "shorter_chosen/accuracy": "accuracy where the chosen response is shorter",
    "shorter_chosen/count": "rows where the chosen response is shorter",
    "mean_squared_error": "mean squared error",
    "absolute_error": "mean absolute error",
    "reward_correlation/pearson": "correlation with the rewards of the data, Pearson",
    "reward_correlation/spearman": "correlation with the rewards of the data, Spearman",
    "length_correlation/pearson": "correlation of score and length, Pearson",
    "length_correlation/spearman": "correlation of score and length, Spearman",
    "ensemble_std": "standard deviation between heads (reward units)",
}


@dataclass(frozen=True)
class RewardModel:
    """What a report shows of a reward model.

    Args:
        name: Directory of its stage.
        figures: Its numbers.
        plots: Calibration, length bias and ensemble.
    """

    name: str
    figures: Table
    plots: list[Plot] = field(default_factory=list)


def summarize_reward_model(record: StageRecord) -> RewardModel:
    """Build the table and the plots of a reward model."""
    name, metrics = identifier(record.name), record.metrics
    found = {title: value for key, title in FIGURES.items() if is_finite(value := _value(metrics, key))}
    table = Table(["metric", "value"], [[text(title), number(value)] for title, value in found.items()], f"rm-{name}")
    has_heads = is_finite(metrics.get("heads")) and metrics["heads"] > 1
    plots = [
        _plot(metrics, f"rm-{name}-{key}", panel) for key, panel in PANELS.items() if has_heads or not panel.needs_heads
    ]
    return RewardModel(record.name, table, [plot for plot in plots if plot is not None])


def _plot(metrics: dict[str, Any], name: str, panel: Panel) -> Plot | None:
    """Draw one column of the buckets against another one; None if there are no complete buckets."""
    (x, x_label), (y, y_label) = panel.x, panel.y
    buckets = _buckets(metrics.get(panel.buckets), (x, y, "count"))
    if not buckets:
        return None
    line = Line(y.replace("_", " "), [bucket[x] for bucket in buckets], [bucket[y] for bucket in buckets], 0)
    return buckets_plot(
        name,
        panel.title,
        [line],
        (x_label, y_label),
        counts=[bucket["count"] for bucket in buckets],
        diagonal=panel.ideal_diagonal,
        level=_value(metrics, "accuracy") if panel.buckets == "by_length_difference" else None,
    )


def _buckets(found: Any, keys: Sequence[str]) -> list[dict[str, float]]:
    buckets = found if isinstance(found, list) else []
    return [item for item in buckets if isinstance(item, dict) and all(is_finite(item.get(key)) for key in keys)]


def _value(metrics: Any, key: str) -> Any:
    """Return a value by its key, whose levels are separated by slashes; None if there is none."""
    for part in key.split("/"):
        metrics = metrics.get(part) if isinstance(metrics, dict) else None
    return metrics
