"""Output formats of the reward-model report: scalars, text and a plot."""

from typing import TYPE_CHECKING, Any

from rlhf.metrics.reward_panels import PANELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABEL_WIDTH = 32  # Width of the first column of the text tables.


def scalars(report: dict[str, Any], prefix: str = "report") -> dict[str, float]:
    """Return the single numbers of a report under their logged names, such as ``report/length_correlation/pearson``."""
    numbers: dict[str, float] = {}
    for name, value in report.items():
        if isinstance(value, dict):
            numbers |= scalars(value, f"{prefix}/{name}")
        elif isinstance(value, int | float):
            numbers[f"{prefix}/{name}"] = float(value)
    return numbers


def summary(report: dict[str, Any]) -> str:
    """Return the most important numbers of a report as a few lines of text."""
    lines = _rating_lines(report) if report["kind"] == "ratings" else _pair_lines(report)
    return "\n  ".join(lines)


def _pair_lines(report: dict[str, Any]) -> list[str]:
    by_length = [
        f"{f'the {which} response is chosen':>{LABEL_WIDTH}}{group['count']:>8}{_format(group['accuracy']):>10}"
        for which, group in (("longer", report["longer_chosen"]), ("shorter", report["shorter_chosen"]))
    ]
    return [
        f"{report['count']} held-out pairs: accuracy {_format(report['accuracy'])}, "
        f"calibration error {_format(report['calibration_error'])}",
        _length_line(report),
        *_table("chosen - rejected, tokens", report["by_length_difference"], "accuracy"),
        *by_length,
    ]


def _rating_lines(report: dict[str, Any]) -> list[str]:
    correlation = report["reward_correlation"]
    return [
        f"{report['count']} held-out ratings: mean absolute error {_format(report['absolute_error'])}, "
        f"correlation of score and rating: {_format_correlation(correlation)}",
        _length_line(report),
        *_table("rating", report["by_reward"], "absolute_error"),
    ]


def _length_line(report: dict[str, Any]) -> str:
    return f"correlation of score and response length: {_format_correlation(report['length_correlation'])}"


def _table(label: str, buckets: list[dict[str, float]], column: str) -> list[str]:
    rows = [(f"{bucket['low']:.4g} to {bucket['high']:.4g}", bucket["count"], bucket[column]) for bucket in buckets]
    return [
        f"{label:>{LABEL_WIDTH}}{'count':>8}{column.split('_')[-1]:>10}",
        *(f"{bounds:>{LABEL_WIDTH}}{count:>8}{_format(value):>10}" for bounds, count, value in rows),
    ]


def _format(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _format_correlation(correlation: dict[str, float | None]) -> str:
    return f"Pearson {_format(correlation['pearson'])}, Spearman {_format(correlation['spearman'])}"


def plot(report: dict[str, Any]) -> "Figure":
    """Plot the curves of a report next to each other; with several heads, also that of their standard deviation."""
    from matplotlib.figure import Figure  # Imported here, because it is slow and needed only after training.

    panels = [
        panel
        for panel in PANELS.values()
        if report["kind"] in panel.kinds and (report["heads"] > 1 or not panel.needs_heads)
    ]
    figure = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        x, y = ([bucket[key] for bucket in report[panel.buckets]] for key in (panel.x[0], panel.y[0]))
        axes.plot(x, y, marker="o")
        if panel.ideal_diagonal:
            axes.plot([min(x), max(x)], [min(x), max(x)], linestyle=":", color="gray")
        axes.set(xlabel=panel.x[1], ylabel=panel.y[1], title=panel.buckets.replace("_", " "))
        if panel.y[0] == "accuracy":
            axes.set_ylim(top=1.02)
    return figure
