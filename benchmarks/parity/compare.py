"""Relative differences between the two sides, as rows of a table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cases import Case

# Smaller values count as this value. Sums of log-probs near -200 nats have rounding errors of 1.5e-5 in float32. With
# beta 0.1, margins, which start at 0, have errors of 3e-6 reward units, which is 1e-4 of this value.
FLOOR = 0.03
CURVE_TOLERANCE = 1e-4
PPO_TOLERANCE = 1e-5


@dataclass
class Row:
    """One metric that both sides computed.

    Args:
        case: The case.
        metric: Label of the metric.
        extent: Number of steps, passes or entries that are compared.
        difference: Largest relative difference among them.
        tolerance: Largest difference that counts as agreement.
        reason: Why they differ, if that is known, and which side is correct.
    """

    case: str
    metric: str
    extent: str
    difference: float
    tolerance: float
    reason: str = ""

    @property
    def outcome(self) -> str:
        """``agree``, ``differ`` (with a known reason) or ``differ, unexplained``."""
        if self.difference <= self.tolerance:
            return "agree"
        return "differ" if self.reason else "differ, unexplained"

    @property
    def explanation(self) -> str:
        return self.reason if self.outcome == "differ" else ""


def relative(ours: float, theirs: float, floor: float) -> float:
    """Return ``|a - b| / max(|a|, |b|, floor)``, or infinity if one of them is NaN."""
    difference = abs(ours - theirs) / max(abs(ours), abs(theirs), floor)
    return difference if difference == difference else float("inf")


def largest_relative(ours: Sequence[float], theirs: Sequence[float], floor: float) -> float:
    """Return the largest relative difference of two series of equal length."""
    return max(relative(a, b, floor) for a, b in zip(ours, theirs, strict=True))


def compare_curves(case: Case, ours: dict[str, Any], theirs: dict[str, Any]) -> list[Row]:
    """Return the rows of one case.

    Raises:
        ValueError: A batch did not have the same token ids on both sides.
    """
    if ours["batches"] != theirs["batches"]:
        raise ValueError(f"{case.name}: the token ids of the two sides differ")
    rows = []
    for label, (here, there) in case.metrics.items():
        series = [step[here] for step in ours["curve"]], [step[there] for step in theirs["curve"]]
        name, extent = f"{case.name} ({case.trainer})", f"{len(ours['curve'])} steps"
        rows.append(Row(name, label, extent, largest_relative(*series, FLOOR), CURVE_TOLERANCE, case.reason))
    return rows


def table(rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table. Rows with equal case, outcome and reason are merged."""
    groups: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for row in rows:
        group = groups.setdefault((row.case, row.outcome, row.explanation), {})
        group.setdefault(row.extent, []).append(f"{row.metric} {row.difference:.1e}")
    lines = ["| case | largest relative difference | outcome | reason, and which is correct |", "|" + "---|" * 4]
    for (case, outcome, reason), group in groups.items():
        metrics = "; ".join(f"{', '.join(metrics)} ({extent})" for extent, metrics in group.items())
        lines.append(f"| {case} | {metrics} | {outcome} | {reason} |")
    return "\n".join(lines)
