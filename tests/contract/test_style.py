"""Limits that keep the code readable: lengths of files and functions, and no formatter pragmas."""

import ast
from pathlib import Path

import pytest

from contract.configs import ROOT
from contract.imports import FILES, module_name

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40
PYTHON_FILES = sorted(
    path
    for folder in ("rlhf", "tests", "benchmarks", "data", "docs", "examples")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_and_functions_are_short(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - body_start(node) for node in functions}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def body_start(function: ast.FunctionDef) -> int:
    """Return the line before the first statement; docstrings and signatures do not count."""
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return statements[0].lineno - 1 if statements else (function.end_lineno or 0)


def test_the_formatter_always_wins() -> None:
    pragma = "# " + "fmt:"
    assert [str(path.relative_to(ROOT)) for path in PYTHON_FILES if pragma in path.read_text(encoding="utf-8")] == []


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
