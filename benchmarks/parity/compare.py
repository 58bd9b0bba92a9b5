"""Two sides' numbers as rows of a table: how far apart they are, and why where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cases import Case

FLOOR = 0.01  # what is smaller counts as this large, so that a margin of 0 does not divide by 0
CURVE_TOLERANCE = 1e-4
PPO_TOLERANCE = 1e-5


@dataclass
class Row:
    """One row of the table."""

    what: str
    number: str
    steps: str
    relative: float
    absolute: float
    tolerance: float
    reason: str = ""

    def __str__(self) -> str:
        verdict = "agree" if self.relative <= self.tolerance else "differ"
        cells = (self.what, self.number, self.steps, f"{self.relative:.1e}", f"{self.absolute:.1e}", verdict)
        return f"| {' | '.join(cells)} | {self.reason if verdict == 'differ' else ''} |"


HEAD = (
    "| what | number | steps | largest relative difference | largest absolute difference | verdict | why, and which is "
    "right |\n|---|---|---|---|---|---|---|"
)


def relative(ours: float, theirs: float, floor: float) -> float:
    """|a - b| / max(|a|, |b|, floor); infinite where one of them is no number."""
    apart = abs(ours - theirs) / max(abs(ours), abs(theirs), floor)
    return apart if apart == apart else float("inf")


def compare_series(
    what: str, number: str, ours: Sequence[float], theirs: Sequence[float], *, floor: float, tolerance: float,
    steps: str, reason: str = "",
) -> Row:  # fmt: skip
    """One row of two series of numbers; they must be of one length."""
    pairs = list(zip(ours, theirs, strict=True))
    return Row(
        what,
        number,
        steps,
        max(relative(a, b, floor) for a, b in pairs),
        max(abs(a - b) for a, b in pairs),
        tolerance,
        reason,
    )


def compare_curves(case: Case, ours: dict[str, Any], theirs: dict[str, Any]) -> list[Row]:
    """The rows of one case. Raises ValueError if a batch did not hold the same tokens on both sides."""
    if ours["batches"] != theirs["batches"]:
        raise ValueError(f"{case.name}: the two sides were given different tokens")
    return [
        compare_series(
            f"{case.name} ({case.trainer})", label, [step[here] for step in ours["curve"]],
            [step[there] for step in theirs["curve"]], floor=FLOOR, tolerance=CURVE_TOLERANCE,
            steps=str(len(ours["curve"])), reason=case.reason,
        )
        for label, (here, there) in case.numbers.items()
    ]  # fmt: skip
