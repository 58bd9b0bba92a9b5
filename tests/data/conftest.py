"""Fixtures for the tests of data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """A function that writes rows to a JSONL file and returns its path."""

    def write(*rows: dict[str, Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def demonstrations() -> Callable[[int], list[dict[str, str]]]:
    """A function that returns so many demonstrations: Q0 and A0, Q1 and A1, ..."""
    return lambda count: [{"document": f"Q{i}", "target": f"A{i}"} for i in range(count)]
