"""The parts of the comparison with TRL that do not need TRL: arithmetic on recorded results, and the table."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "parity"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.fixture
def compare_ppo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, imported from its directory as the scripts import it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import compare_ppo

    yield compare_ppo
    for script in SCRIPTS:
        sys.modules.pop(script.stem, None)


def test_scripts_parse_and_have_docstrings() -> None:
    assert len(SCRIPTS) >= 7
    for script in SCRIPTS:
        assert ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))), script


def test_help_names_the_interpreters() -> None:
    """It needs neither TRL nor torch."""
    shown = subprocess.run([sys.executable, FOLDER / "run.py", "--help"], capture_output=True, text=True, check=True)
    assert "--trl-python" in shown.stdout
    assert "--trl-ppo-python" in shown.stdout


def test_relative_difference_by_hand(compare_ppo: ModuleType) -> None:
    """|2 - 1| / 2 = 0.5; |0.001 - 0| / 0.01 = 0.1 with a floor of 0.01; NaN is never close."""
    relative = sys.modules["compare"].relative
    assert relative(1.0, -0.0, floor=0.01) == 1.0
    assert relative(2.0, 1.0, floor=0.01) == 0.5
    assert relative(0.001, 0.0, floor=0.01) == pytest.approx(0.1)
    assert relative(float("nan"), 1.0, floor=0.01) == float("inf")


def test_moving_the_score_to_the_last_token_by_hand(compare_ppo: ModuleType) -> None:
    """A response of two tokens with a position after its end, and one without; gamma 1, lambda 0.5.

    The values are 1 and 2, and 3 after the end; the score is 7 and there is no KL.
    TRL: A_end = 7 - 3 = 4, A_1 = 3 - 2 + 0.5 x 4 = 3, A_0 = 2 - 1 + 0.5 x 3 = 2.5.
    With the score at the last token: A_1 = 7 - 2 = 5, A_0 = 2 - 1 + 0.5 x 5 = 3.5.
    """
    setting = sys.modules["cases"].Iteration("by hand", gamma=1.0, gae_lambda=0.5, eos_logit=0.0)
    theirs = {"advantages": [[2.5, 3.0], [1.0]], "value after the end": [3.0, None], "scores": [7.0, 9.0]}
    assert compare_ppo.without_slot(setting, theirs, "advantages") == [[3.5, 5.0], [1.0]]


def test_removing_the_extra_position_from_the_value_loss_by_hand(compare_ppo: ModuleType) -> None:
    """Half squared errors are 1 and 2 at tokens and 0.5 x (3 - 7)^2 = 8 after the end. TRL: 11 / 3, ours: 3 / 2."""
    theirs = {
        "values": [[0.0, 0.0]],
        "value after the end": [3.0],
        "return after the end": [7.0],
        "passes": [{"value loss": 11 / 3}],
    }
    assert compare_ppo.value_loss_without_slot(theirs) == pytest.approx(1.5)


def test_rows_are_merged_into_a_table(compare_ppo: ModuleType) -> None:
    """Rows with equal case, outcome and reason share a line; a difference needs a reason."""
    row, table = sys.modules["compare"].Row, sys.modules["compare"].table
    rows = [
        row("A", "loss", "20 steps", 1e-6, 1e-4, "not used"),
        row("A", "margin", "20 steps", 1e-5, 1e-4, "not used"),
        row("A", "scores", "16 responses", 0.5, 1e-4, "known"),
        row("B", "loss", "20 steps", 0.5, 1e-4),
    ]
    assert [each.outcome for each in rows] == ["agree", "agree", "differ", "differ, unexplained"]
    assert table(rows).splitlines()[2:] == [
        "| A | loss 1.0e-06, margin 1.0e-05 (20 steps) | agree |  |",
        "| A | scores 5.0e-01 (16 responses) | differ | known |",
        "| B | loss 5.0e-01 (20 steps) | differ, unexplained |  |",
    ]
