"""Output formats of the reward-model report: JSON, scalars, text and plot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.files import write_json
from rlhf.reward.report import pair_report, rating_report
from rlhf.reward.report_output import plot, scalars, summary


def report(kind: str, heads: int = 1) -> dict[str, Any]:
    """Return a report on four rows. The model is wrong about the last pair."""
    scores = torch.tensor([[1.0], [2.0], [3.0], [-1.0]]).expand(-1, heads)
    lengths = torch.tensor([5, 6, 7, 8])
    if kind == "ratings":
        return rating_report(scores, torch.tensor([1.0, 2.0, 3.0, 4.0]), lengths)
    return pair_report(scores, torch.zeros(4, heads), lengths, torch.tensor([9, 6, 3, 2]))


@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_json_file_contains_the_report(kind: str, tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "metrics.json", report(kind))
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == report(kind)


def test_scalars_are_named_by_their_path() -> None:
    """Text, lists and undefined numbers are left out."""
    numbers = scalars(
        {"kind": "pairs", "count": 4, "longer": {"accuracy": None, "count": 0}, "by_length": [{"low": 1.0}]}
    )
    assert numbers == {"report/count": 4.0, "report/longer/count": 0.0}
    assert {"report/accuracy", "report/length_correlation/pearson", "report/longer_chosen/accuracy"} <= scalars(
        report("pairs")
    ).keys()


def test_summary_of_pairs() -> None:
    """Differences 1, 2, 3 are correct and -1 is wrong. The chosen response is longer by -4, 0, 4, 6 tokens."""
    lines = summary(report("pairs")).splitlines()
    assert lines[0].startswith("4 held-out pairs: accuracy 0.750, calibration error ")
    assert [line.split() for line in lines[3:]] == [
        ["-4", "to", "-4", "1", "1.000"],
        ["0", "to", "0", "1", "1.000"],
        ["4", "to", "4", "1", "1.000"],
        ["6", "to", "6", "1", "0.000"],
        ["the", "longer", "response", "is", "chosen", "2", "0.500"],
        ["the", "shorter", "response", "is", "chosen", "1", "1.000"],
    ]
    assert len({len(line) for line in lines[2:]}) == 1, "the columns are aligned"


def test_summary_of_ratings() -> None:
    """Three scores equal their ratings, and the last one differs by 5."""
    lines = summary(report("ratings")).splitlines()
    assert lines[0].startswith(
        "4 held-out ratings: mean absolute error 1.250, correlation of score and rating: Pearson "
    )
    assert [line.split() for line in lines[3:]] == [
        ["1", "to", "1", "1", "0.000"],
        ["2", "to", "2", "1", "0.000"],
        ["3", "to", "3", "1", "0.000"],
        ["4", "to", "4", "1", "5.000"],
    ]


@pytest.mark.parametrize(
    ("kind", "heads", "panels"), [("pairs", 1, 3), ("pairs", 2, 4), ("ratings", 1, 2), ("ratings", 2, 3)]
)
def test_plot_shows_every_curve(kind: str, heads: int, panels: int) -> None:
    """Each panel shows the points of one list of buckets. The one of ensemble_std needs several heads."""
    figure = plot(report(kind, heads))
    assert len(figure.axes) == panels
    first = figure.axes[0].lines[0]
    if kind == "pairs":
        assert (list(first.get_xdata()), list(first.get_ydata())) == ([-4, 0, 4, 6], [1, 1, 1, 0])
    else:
        assert (list(first.get_xdata()), list(first.get_ydata())) == ([1, 2, 3, 4], [1, 2, 3, -1])
    figure.canvas.draw()
