"""The plots of a report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from rlhf.printable import printable
from rlhf.report.events import Alert
from rlhf.report.figures import (
    ALERT,
    GRID,
    INK,
    MUTED,
    LegendEntry,
    Line,
    Plot,
    color_of,
    drawing,
    hover_data,
    thin,
    to_svg,
)

FEW = 40  # points of a curve that is drawn without a running mean
DASHES = ["-", (0, (5, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2))]  # of the lines of several runs
MARKED = 3  # points of a curve that is drawn with markers


@dataclass(frozen=True)
class Point:
    """A point with intervals.

    Args:
        label: Its name.
        x: Position.
        y: Value.
        x_range: Bounds of the interval of the position; None if there is none.
        y_range: Bounds of the interval of the value; None if there is none.
        color: Number of its color.
    """

    label: str
    x: float
    y: float
    x_range: tuple[float, float] | None
    y_range: tuple[float, float] | None
    color: int


def curves_plot(
    name: str, title: str, lines: Sequence[Line], alerts: Sequence[Alert] = (), *, compares: bool = False
) -> Plot:
    """Draw metrics by step. Long curves are drawn faintly, with their running mean on top.

    Args:
        name: Identifier in the page.
        title: What the plot shows.
        lines: Series by step.
        alerts: Alerts to mark by a line where they fire and by shading while they are active.
        compares: Whether the lines are the same metric of several runs. Different dashes make equal lines visible.
    """
    drawn = [Line(line.label, *thin(list(map(int, line.x)), line.y), line.color) for line in lines]
    with drawing() as (figure, axes):
        for whole, line in zip(lines, drawn, strict=True):
            _draw_curve(axes, whole, line, DASHES[line.color % len(DASHES)] if compares else "-")
        _widen_constant(axes, lines)
        for alert in alerts:
            if alert.end is not None and alert.end > alert.start:
                axes.axvspan(alert.start, alert.end, color=ALERT, alpha=0.12, linewidth=0)
            axes.axvline(alert.start, color=ALERT, linewidth=1.2, linestyle=(0, (3, 2)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x", visible=False)
        figure.draw_without_rendering()
        svg = to_svg(figure, name, f"{title} by step")
        hover = hover_data(axes, figure, drawn, x_name="step")
    legend = [LegendEntry(line.label, line.color) for line in lines] if len(lines) > 1 else []
    return Plot(name, title, svg, legend, hover, _gaps(lines))


def _draw_curve(axes: Any, whole: Line, line: Line, dashes: Any) -> None:
    color = color_of(line.color)
    if len(whole.x) <= MARKED:
        axes.plot(line.x, line.y, color=color, marker="o", markersize=5, linestyle="-")
        return
    smooth = len(whole.x) > FEW and is_noisy(whole.y)
    axes.plot(
        line.x, line.y, color=color, alpha=0.3 if smooth else 1, linewidth=0.9 if smooth else 1.6, linestyle=dashes
    )
    if smooth:
        axes.plot(*thin(list(map(int, whole.x)), running_mean(whole.y), 200), color=color, linestyle=dashes)


def is_noisy(values: Sequence[float]) -> bool:
    """Return whether a curve goes up and down more than once over its whole range, as that of a schedule does not."""
    finite = [value for value in values if math.isfinite(value)]
    path = sum(abs(after - before) for before, after in pairwise(finite))
    return bool(finite) and path > 2.5 * (max(finite) - min(finite))


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean around each point, over 5% of all points and at least 5.

    The point is in the middle of its window, so that the means do not lag behind the values. Windows end at the first
    and the last point. Values that are not finite are left out.
    """
    if not values:
        return []
    half = max(5, len(values) // 20) // 2
    padded = np.pad(np.asarray(values, dtype=np.float64), half, constant_values=np.nan)
    finite = np.isfinite(padded)
    sums, counts = (
        np.lib.stride_tricks.sliding_window_view(array, 2 * half + 1).sum(-1)
        for array in (np.where(finite, padded, 0.0), finite)
    )
    return list(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).tolist())


def _widen_constant(axes: Any, lines: Sequence[Line]) -> None:
    """Give a constant curve a visible range, so that its rounding errors are not enlarged."""
    values = [value for line in lines for value in line.y if math.isfinite(value)]
    if values and max(values) - min(values) <= 1e-9 * max(1.0, abs(max(values))):
        margin = max(abs(values[0]) * 0.1, 0.1)
        axes.set_ylim(values[0] - margin, values[0] + margin)


def _gaps(lines: Sequence[Line]) -> str:
    """Return a note on values that cannot be drawn."""
    missing = sum(not math.isfinite(value) for line in lines for value in line.y)
    return f"Values that are not finite: {missing}." if missing else ""


def tradeoff_plot(
    name: str, title: str, lines: Sequence[Line], points: Sequence[Point], x_label: str, y_label: str
) -> Plot:
    """Draw rewards against the KL divergence: lines of training, and points of evaluated policies with intervals."""
    with drawing(410, 270) as (figure, axes):
        for line in lines:
            axes.plot(line.x, line.y, color=color_of(line.color), alpha=0.45, linewidth=1, marker="o", markersize=3)
        for point in points:
            color = color_of(point.color)
            if point.y_range:
                axes.plot([point.x, point.x], point.y_range, color=color, linewidth=2)
            if point.x_range:
                axes.plot(point.x_range, [point.y, point.y], color=color, linewidth=2)
            axes.plot([point.x], [point.y], color=color, marker="o", markersize=8, markeredgecolor=INK)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        figure.draw_without_rendering()
        svg = to_svg(figure, name, title)
        shown = [*lines, *(Line(f"{point.label}, evaluated", [point.x], [point.y], point.color) for point in points)]
        hover = {**hover_data(axes, figure, shown, x_name="KL"), "nearest": True}
    named = [(line.label.partition(",")[0], line.color) for line in lines] + [(one.label, one.color) for one in points]
    legend = [LegendEntry(label, color) for label, color in dict.fromkeys(named)]
    return Plot(name, title, svg, legend, hover)


def intervals_plot(name: str, title: str, rows: Sequence[tuple[str, float, float, float, int]], x_label: str) -> Plot:
    """Draw win rates with their intervals, one row each.

    Args:
        name: Identifier in the page.
        title: What the plot shows.
        rows: Label, value, lower and upper bound, and number of the color, from top to bottom.
        x_label: What the horizontal axis shows.
    """
    with drawing(410, 56 + 27 * len(rows)) as (figure, axes):
        axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        for number, (_, value, low, high, color) in enumerate(rows):
            axes.plot([low, high], [number, number], color=color_of(color), linewidth=2.5)
            axes.plot([value], [number], color=color_of(color), marker="o", markersize=7)
            axes.annotate(
                f"{value:.3f}",
                (value, number),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=9.5,
                color=INK,
            )
        axes.set_yticks(range(len(rows)), [shorten(row[0]) for row in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(rows) - 0.5, -0.7)
        axes.set_xlim(-0.02, 1.02)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(x_label)
        figure.draw_without_rendering()
        return Plot(name, title, to_svg(figure, name, title))


def shorten(label: str, limit: int = 26) -> str:
    """Return a label that fits next to a plot: the middle of a long one is left out.

    Characters that SVG cannot contain are escaped.
    """
    label = printable(label)
    return label if len(label) <= limit else f"{label[: limit // 2 - 1]}…{label[-limit // 2 :]}"


def buckets_plot(
    name: str,
    title: str,
    lines: Sequence[Line],
    labels: tuple[str, str],
    *,
    counts: Sequence[float] = (),
    diagonal: bool = False,
    level: float | None = None,
) -> Plot:
    """Draw means of buckets.

    Args:
        name: Identifier in the page.
        title: What the plot shows.
        lines: Series; a point is a bucket.
        labels: What the axes show.
        counts: Rows of each bucket, which are the areas of its marker.
        diagonal: Draw the line on which both axes are equal.
        level: Draw a horizontal line at this value.
    """
    largest = max(counts, default=1) or 1
    with drawing(324, 214) as (figure, axes):
        for line in lines:
            color = color_of(line.color)
            axes.plot(line.x, line.y, color=color, linewidth=1.4)
            sizes = [18 + 50 * count / largest for count in counts] if len(counts) == len(line.x) else 36
            axes.scatter(line.x, line.y, s=sizes, color=color, zorder=3)
        if diagonal:
            low, high = axes.get_xlim()
            axes.plot([low, high], [low, high], color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
            axes.set_xlim(low, high)
        if level is not None:
            axes.axhline(level, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.spines["bottom"].set_color(GRID)
        figure.draw_without_rendering()
        svg = to_svg(figure, name, title)
        hover = {**hover_data(axes, figure, lines, x_name=labels[0]), "nearest": True}
    legend = [LegendEntry(line.label, line.color) for line in lines] if len(lines) > 1 else []
    return Plot(name, title, svg, legend, hover)
