"""A reward model's report in four forms: a file, numbers to log, lines of text, a picture."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# the curves of the picture: list in the report, its x and y, what they are, and whether they should lie on y = x
LENGTH_PANEL = ("by_length", "length", "score", "answer, tokens", "mean score, reward units", False)
PANELS = {
    "pairs": (
        ("by_length_difference", "difference", "accuracy", "chosen - rejected, tokens", "accuracy", False),
        ("by_confidence", "confidence", "accuracy", "confidence", "accuracy", True),
        LENGTH_PANEL,
    ),
    "ratings": (
        ("by_reward", "reward", "score", "reward of the data", "mean score, reward units", True),
        LENGTH_PANEL,
    ),
}
SPREAD_PANEL = {
    "pairs": ("by_spread", "spread", "accuracy", "spread of the heads, reward units", "accuracy", False),
    "ratings": ("by_spread", "spread", "absolute_error", "spread of the heads, reward units", "mean error", False),
}

WIDTH = 30  # of the first column of a table of text


def write_json(report: dict[str, Any], path: Path) -> None:
    """The whole report as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def scalars(report: dict[str, Any], prefix: str = "report") -> dict[str, float]:
    """The report's single numbers under the names they are logged by, such as ``report/length_correlation/pearson``."""
    found: dict[str, float] = {}
    for name, value in report.items():
        if isinstance(value, dict):
            found |= scalars(value, f"{prefix}/{name}")
        elif isinstance(value, int | float):
            found[f"{prefix}/{name}"] = float(value)
    return found


def as_text(report: dict[str, Any]) -> str:
    """The report in a few lines, for the terminal and the log."""
    lines = _rating_lines(report) if report["kind"] == "ratings" else _pair_lines(report)
    return "\n  ".join(lines)


def _pair_lines(report: dict[str, Any]) -> list[str]:
    length = report["length_correlation"]
    return [
        f"{report['count']} held-out pairs: accuracy {_number(report['accuracy'])}, "
        f"calibration error {_number(report['calibration_error'])}",
        f"score and length of the answer: Pearson {_number(length['pearson'])}, Spearman {_number(length['spearman'])}",
        *_table("chosen - rejected, tokens", report["by_length_difference"], "accuracy"),
        *(
            f"{f'the {which} answer is chosen':>{WIDTH}}{part['count']:>8}{_number(part['accuracy']):>10}"
            for which in ("longer", "shorter")
            for part in [report[f"{which}_chosen"]]
        ),
    ]


def _rating_lines(report: dict[str, Any]) -> list[str]:
    reward, length = report["reward_correlation"], report["length_correlation"]
    return [
        f"{report['count']} held-out ratings: mean error {_number(report['absolute_error'])}, "
        f"score and rating: Pearson {_number(reward['pearson'])}, Spearman {_number(reward['spearman'])}",
        f"score and length of the answer: Pearson {_number(length['pearson'])}, Spearman {_number(length['spearman'])}",
        *_table("rating", report["by_reward"], "absolute_error"),
    ]


def _table(what: str, buckets: list[dict[str, float]], column: str) -> list[str]:
    limits = [f"{bucket['low']:.4g} to {bucket['high']:.4g}" for bucket in buckets]
    return [
        f"{what:>{WIDTH}}{'count':>8}{column.split('_')[-1]:>10}",
        *(
            f"{limit:>{WIDTH}}{bucket['count']:>8}{_number(bucket[column]):>10}"
            for limit, bucket in zip(limits, buckets, strict=True)
        ),
    ]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def picture(report: dict[str, Any]) -> "Figure":
    """The report's curves side by side; the spread's too where there are several heads."""
    from matplotlib.figure import Figure  # only once training has ended

    panels = [*PANELS[report["kind"]], *([SPREAD_PANEL[report["kind"]]] if report["heads"] > 1 else [])]
    figure = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
    for axes, (name, x, y, x_label, y_label, diagonal) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        buckets = report[name]
        across = [bucket[x] for bucket in buckets]
        axes.plot(across, [bucket[y] for bucket in buckets], marker="o")
        if diagonal:
            axes.plot([min(across), max(across)], [min(across), max(across)], linestyle=":", color="grey")
        axes.set(xlabel=x_label, ylabel=y_label, title=name.replace("_", " "))
        if y == "accuracy":
            axes.set_ylim(top=1.02)
    return figure
