"""Plots as inline SVG whose colors are variables of the page's style sheet, so that they follow its color scheme."""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH, HEIGHT = 324, 172  # pixels at the size for which the font was chosen
SERIES = 8  # colors of series, then they repeat
INK, MUTED, GRID, ALERT = "#000001", "#000002", "#000003", "#000004"  # placeholders, see VARIABLES
SERIES_COLORS = [f"#0000{16 + number:x}" for number in range(SERIES)]
VARIABLES = {
    **{INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", ALERT: "var(--alert)"},
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES_COLORS)},
}
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # A dollar sign in the name of a run is only text.
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 1,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class LegendEntry:
    """One entry of a legend, which the page shows above the plot: a label and the number of its color."""

    label: str
    color: int


@dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Args:
        id: Identifier in the page.
        title: What it shows.
        svg: The drawing.
        legend: Its series, if there are several.
        hover: What the script of the page needs to show values under the pointer.
        note: A sentence below the plot.
    """

    id: str
    title: str
    svg: Markup
    legend: list[LegendEntry] = field(default_factory=list)
    hover: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One series of a plot.

    Args:
        label: Its name.
        x: Positions, such as steps.
        y: Values.
        color: Number of its color.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int


@contextmanager
def drawing(width: float = WIDTH, height: float = HEIGHT) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure and its axes in the style of the report.

    Args:
        width: Width in pixels.
        height: Height in pixels.
    """
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # The browser has other fonts.
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=3 / 72, h_pad=3 / 72)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        yield figure, axes


def color_of(number: int) -> str:
    """Return the placeholder of the color of a series."""
    return SERIES_COLORS[number % SERIES]


def to_svg(figure: Figure, name: str, label: str) -> Markup:
    """Return the SVG of a figure for a page with a strict content security policy.

    Args:
        figure: The figure.
        name: Prefix of the identifiers in it, which must be unique in the page.
        label: Description for screen readers.
    """
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.id": None}):
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(file, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    used = set(re.findall(rb'"(?:url\()?#([^")]+)\)?"', file.getvalue()))
    for element in root.iter():
        _simplify(element, name, {match.decode() for match in used})
    for parent in root.iter():
        for child in [child for child in parent if child.tag in ("style", "metadata")]:
            parent.remove(child)
    view = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib |= {"viewBox": view, "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _simplify(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Turn styles into attributes and colors into variables, and remove namespaces and identifiers without use."""
    element.tag = element.tag.rpartition("}")[2]
    attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    style = dict(part.split(":", 1) for part in attributes.pop("style", "").split(";") if ":" in part)
    for key, value in style.items():
        key, value = key.strip(), value.strip()
        if key == "font":
            size = re.search(r"([\d.]+)px", value)
            key, value = "font-size", size[1] if size else ""
        attributes[key] = VARIABLES.get(value, value)
    if attributes.get("id") in used:
        attributes["id"] = f"{name}-{attributes['id']}"
    else:
        attributes.pop("id", None)
    for key in ("href", "clip-path"):
        if key in attributes:
            attributes[key] = attributes[key].replace("#", f"#{name}-", 1)
    if "d" in attributes:
        attributes["d"] = re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", attributes["d"])
        attributes["d"] = re.sub(r"\s+", " ", attributes["d"])
    element.attrib.clear()
    element.attrib |= attributes
    if element.tag != "text":
        element.text = element.text.strip() if element.text else None
    element.tail = None


def hover_data(axes: Any, figure: Figure, lines: Sequence[Line], *, x_name: str) -> dict[str, Any]:
    """Return what the script of the page needs to show values under the pointer.

    Args:
        axes: Axes, after the figure has been drawn.
        figure: Their figure.
        lines: Series of the plot.
        x_name: What the horizontal axis shows, such as ``step``.
    """
    box, height = axes.get_window_extent(), figure.bbox.height
    return {
        "box": [round(value, 1) for value in (box.x0, height - box.y1, box.x1, height - box.y0)],
        "x": list(map(float, axes.get_xlim())),
        "y": list(map(float, axes.get_ylim())),
        "x_name": x_name,
        "lines": [
            {"label": line.label, "color": line.color % SERIES, "x": list(line.x), "y": list(map(finite, line.y))}
            for line in lines
        ],
    }


def finite(value: float) -> float | None:
    """Return a number that JSON can contain: None in place of NaN and infinity."""
    return value if math.isfinite(value) else None


def thin(steps: Sequence[int], values: Sequence[float], limit: int = 500) -> tuple[list[int], list[float]]:
    """Return at most about ``limit`` of the logged points: the smallest and the largest of each interval of steps.

    Spikes remain, and every point that remains is a logged one. The first and the last point remain as well.
    """
    if len(steps) <= limit:
        return list(steps), list(values)
    size = math.ceil(2 * len(steps) / (limit - 2))
    kept = {0, len(steps) - 1}
    for start in range(0, len(steps), size):
        chunk = [number for number in range(start, min(start + size, len(steps))) if math.isfinite(values[number])]
        kept |= {min(chunk, key=values.__getitem__), max(chunk, key=values.__getitem__)} if chunk else {start}
    return [steps[number] for number in sorted(kept)], [values[number] for number in sorted(kept)]
