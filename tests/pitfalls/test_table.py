"""The table in README.md is complete: every pitfall has a regression test, and every test it names exists."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NODE_ID = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def rows() -> dict[int, str]:
    """Return the last column of the table by the number of the pitfall."""
    lines = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| \d", line)]
    return {int(row[0]): row[3] for row in cells if len(row) == 4}


def functions_in(path: Path) -> set[str]:
    """Return the names of the test functions in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def numbered() -> dict[int, set[str]]:
    """Return the tests of this folder by the number in their names."""
    found: dict[int, set[str]] = {}
    for path in HERE.glob("test_*.py"):
        for name in functions_in(path):
            if match := re.match(r"test_(\d\d)_", name):
                found.setdefault(int(match[1]), set()).add(name)
    return found


def test_the_table_is_sorted_and_lists_every_tested_pitfall() -> None:
    assert list(rows()) == sorted(rows())
    assert set(range(1, 31)) <= rows().keys()
    assert numbered().keys() <= rows().keys()


@pytest.mark.parametrize("number", rows())
def test_every_pitfall_has_a_regression_test(number: int) -> None:
    """``here`` requires a test of this folder with that number, ``elsewhere`` the node id of another test."""
    cell = rows()[number]
    assert cell.startswith(("here", "elsewhere: `"))
    assert cell.startswith("here") == (number in numbered())
    named = NODE_ID.findall(cell)
    assert len(named) == cell.count("::")
    assert [f"{path}::{name}" for path, name in named if name not in functions_in(HERE.parent / path)] == []
