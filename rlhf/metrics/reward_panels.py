"""The plots of a reward-model report, for the loggers and for the page of a run. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One curve.

    Args:
        title: Title in the page.
        buckets: Key of a list of buckets in the report.
        x: Entry of a bucket on the horizontal axis, and its label.
        y: Entry of a bucket on the vertical axis, and its label.
        kinds: Kinds of reports that have these buckets.
        ideal_diagonal: Whether an ideal reward model has y = x, which is then drawn as a dotted line.
        needs_heads: Whether only a reward model with several heads has this curve.
    """

    title: str
    buckets: str
    x: tuple[str, str]
    y: tuple[str, str]
    kinds: tuple[str, ...]
    ideal_diagonal: bool = False
    needs_heads: bool = False


ACCURACY = ("accuracy", "accuracy")
SCORE = ("score", "mean score, reward units")
STD = ("ensemble_std", "standard deviation of the heads, reward units")
PANELS = {
    "length-difference": Panel(
        "Accuracy by difference of lengths",
        "by_length_difference",
        ("difference", "chosen length - rejected length, tokens"),
        ACCURACY,
        ("pairs",),
    ),
    "calibration": Panel(
        "Calibration", "by_confidence", ("confidence", "confidence"), ACCURACY, ("pairs",), ideal_diagonal=True
    ),
    "rewards": Panel(
        "Score by reward", "by_reward", ("reward", "reward of the data"), SCORE, ("ratings",), ideal_diagonal=True
    ),
    "length": Panel("Score by length", "by_length", ("length", "response length, tokens"), SCORE, ("pairs", "ratings")),
    "ensemble": Panel("Disagreement of the heads", "by_ensemble_std", STD, ACCURACY, ("pairs",), needs_heads=True),
    "ensemble-error": Panel(
        "Disagreement of the heads",
        "by_ensemble_std",
        STD,
        ("absolute_error", "mean absolute error"),
        ("ratings",),
        needs_heads=True,
    ),
}
