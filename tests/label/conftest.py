"""Pairs for the tests of the preference page."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.label.pairs import Pair, Response
from rlhf.label.session import Session


def make_pairs(count: int) -> list[Pair]:
    """Return pairs of the models a and b. The reward model prefers b by 1."""
    return [
        Pair(f"prompt {n}", Response(f"text a {n}", "a", 0.0), Response(f"text b {n}", "b", 1.0)) for n in range(count)
    ]


@pytest.fixture
def pairs() -> list[Pair]:
    return make_pairs(6)


@pytest.fixture
def open_session(pairs: list[Pair], tmp_path: Path) -> Callable[..., Session]:
    """Opens the session in ``tmp_path``, as a server that is started again does."""

    def opened(**keys: float) -> Session:
        return Session(pairs, tmp_path, **{"overlap": 0.0, **keys})  # type: ignore[arg-type]

    return opened
