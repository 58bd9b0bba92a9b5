"""The report as a file, as numbers, as text and as a picture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.reward.report import pair_report, rating_report
from rlhf.reward.report_output import as_text, picture, scalars, write_json


def report(kind: str, heads: int = 1) -> dict[str, Any]:
    """Four held-out rows, the last pair wrong."""
    scores = torch.tensor([[1.0], [2.0], [3.0], [-1.0]]).expand(-1, heads)
    lengths = torch.tensor([5, 6, 7, 8])
    if kind == "ratings":
        return rating_report(scores, torch.tensor([1.0, 2.0, 3.0, 4.0]), lengths)
    return pair_report(scores, torch.zeros(4, heads), lengths, torch.tensor([9, 6, 3, 2]))


@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_the_file_is_the_report(kind: str, tmp_path: Path) -> None:
    write_json(report(kind), tmp_path / "new" / "metrics.json")
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == report(kind)


def test_single_numbers_are_logged_under_their_path() -> None:
    """Numbers and numbers within; no text, no lists, and nothing for what has no meaning."""
    found = scalars(
        {"kind": "pairs", "count": 4, "longer": {"accuracy": None, "count": 0}, "by_length": [{"low": 1.0}]}
    )
    assert found == {"report/count": 4.0, "report/longer/count": 0.0}
    assert {"report/accuracy", "report/length_correlation/pearson", "report/longer_chosen/accuracy"} <= scalars(
        report("pairs")
    ).keys()


def test_text_of_pairs() -> None:
    """Lead 1, 2, 3 right and -1 wrong; chosen longer by -4, 0, 4, 6 tokens."""
    lines = as_text(report("pairs")).splitlines()
    assert lines[0].startswith("4 held-out pairs: accuracy 0.750, calibration error ")
    assert [line.split() for line in lines[3:]] == [
        ["-4", "to", "-4", "1", "1.000"],
        ["0", "to", "0", "1", "1.000"],
        ["4", "to", "4", "1", "1.000"],
        ["6", "to", "6", "1", "0.000"],
        ["the", "longer", "answer", "is", "chosen", "2", "0.500"],
        ["the", "shorter", "answer", "is", "chosen", "1", "1.000"],
    ]
    assert len({len(line) for line in lines[2:]}) == 1, "the columns stand below each other"


def test_text_of_ratings() -> None:
    """Three ratings met exactly, the last missed by 5."""
    lines = as_text(report("ratings")).splitlines()
    assert lines[0].startswith("4 held-out ratings: mean error 1.250, score and rating: Pearson ")
    assert [line.split() for line in lines[3:]] == [
        ["1", "to", "1", "1", "0.000"],
        ["2", "to", "2", "1", "0.000"],
        ["3", "to", "3", "1", "0.000"],
        ["4", "to", "4", "1", "5.000"],
    ]


@pytest.mark.parametrize(
    ("kind", "heads", "panels"), [("pairs", 1, 3), ("pairs", 2, 4), ("ratings", 1, 2), ("ratings", 2, 3)]
)
def test_the_picture_shows_every_curve(kind: str, heads: int, panels: int) -> None:
    """A panel a curve, with the report's own points; the spread's only where heads can differ."""
    drawn = picture(report(kind, heads))
    assert len(drawn.axes) == panels
    first = drawn.axes[0].lines[0]
    if kind == "pairs":
        assert (list(first.get_xdata()), list(first.get_ydata())) == ([-4, 0, 4, 6], [1, 1, 1, 0])
    else:
        assert (list(first.get_xdata()), list(first.get_ydata())) == ([1, 2, 3, 4], [1, 2, 3, -1])
    drawn.canvas.draw()
