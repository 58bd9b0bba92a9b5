"""Two sides' numbers as rows of a table: how far apart they are, and why where they are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cases import Case

# What is smaller counts as this large. Sums of log-probs near -200 nats are rounded at 1.5e-5 in float32, so margins,
# which start at 0, at 3e-6 reward units with beta 0.1: 1e-4 of this.
FLOOR = 0.03
CURVE_TOLERANCE = 1e-4
PPO_TOLERANCE = 1e-5


@dataclass
class Row:
    """One number that both sides computed.

    Args:
        what: the case.
        number: its name.
        extent: how many steps, passes or entries it has.
        apart: largest relative difference among them.
        tolerance: of the verdict.
        reason: why they differ, where that is known, and which is right.
    """

    what: str
    number: str
    extent: str
    apart: float
    tolerance: float
    reason: str = ""

    @property
    def unpaired(self) -> str:
        if self.apart <= self.tolerance:
            return "agree"
        return "differ" if self.reason else "differ, unexplained"

    @property
    def explanation(self) -> str:
        return self.reason if self.verdict == "differ" else ""


def relative(ours: float, theirs: float, floor: float) -> float:
    """|a - b| / max(|a|, |b|, floor); infinite where one of them is no number."""
    apart = abs(ours - theirs) / max(abs(ours), abs(theirs), floor)
    return apart if apart == apart else float("inf")


def largest_relative(ours: Sequence[float], theirs: Sequence[float], floor: float) -> float:
    """The largest relative difference of two series, which must be of one length."""
    return max(relative(a, b, floor) for a, b in zip(ours, theirs, strict=True))


def compare_curves(case: Case, ours: dict[str, Any], theirs: dict[str, Any]) -> list[Row]:
    """The rows of one case. Raises ValueError if a batch did not hold the same tokens on both sides."""
    if ours["batches"] != theirs["batches"]:
        raise ValueError(f"{case.name}: the two sides were given different tokens")
    rows = []
    for label, (here, there) in case.numbers.items():
        series = [step[here] for step in ours["curve"]], [step[there] for step in theirs["curve"]]
        apart = largest_relative(*series, FLOOR)
        what, extent = f"{case.name} ({case.trainer})", f"{len(ours['curve'])} steps"
        rows.append(Row(what, label, extent, apart, CURVE_TOLERANCE, case.reason))
    return rows


def table(rows: Iterable[Row]) -> str:
    """Rows as markdown: what has one case, verdict and reason stands together, with the extents in brackets."""
    groups: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for row in rows:
        group = groups.setdefault((row.what, row.verdict, row.explanation), {})
        group.setdefault(row.extent, []).append(f"{row.number} {row.apart:.1e}")
    lines = ["| what | largest relative difference of | verdict | why, and which is right |", "|" + "---|" * 4]
    for (what, verdict, reason), group in groups.items():
        numbers = "; ".join(f"{', '.join(numbers)} ({extent})" for extent, numbers in group.items())
        lines.append(f"| {what} | {numbers} | {verdict} | {reason} |")
    return "\n".join(lines)
