"""The table in README.md beside this file is whole: every pitfall has a test, or a reason why it has none."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NODE = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def rows() -> dict[int, str]:
    """Number of each pitfall, and what its last column says."""
    lines = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| \d", line)]
    return {int(row[0]): row[3] for row in cells if len(row) == 4}


def names_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def numbered() -> dict[int, set[str]]:
    """The tests of this folder by the number in their names."""
    found: dict[int, set[str]] = {}
    for path in HERE.glob("test_*.py"):
        for name in names_of(path):
            if match := re.match(r"test_(\d\d)_", name):
                found.setdefault(int(match[1]), set()).add(name)
    return found


def test_the_numbers_are_1_to_29() -> None:
    assert list(rows()) == list(range(1, 30))
    assert numbered().keys() <= rows().keys()


@pytest.mark.parametrize("number", rows())
def test_a_pitfall_has_a_test_or_a_reason(number: int) -> None:
    """``here`` is a test of this folder that bears the number, and every test that is named is there."""
    cell = rows()[number]
    reason = re.match(r"(cannot apply|no test of its own)( yet)?: \w+", cell)
    assert cell.startswith("here") or reason
    assert cell.startswith("here") == (number in numbered())
    named = NODE.findall(cell)
    assert len(named) == cell.count("::")
    assert [f"{path}::{name}" for path, name in named if name not in names_of(HERE.parent / path)] == []
