"""Imported modules are not searched for garbage."""

import gc
import subprocess
import sys
from pathlib import Path

from rlhf.process.garbage import imports

FIRST = """
import gc
from rlhf.process.garbage import imports
with imports():
    assert not gc.isenabled()
    import torch
print(gc.get_freeze_count() > 10_000, gc.isenabled())
"""


def test_modules_are_excluded_from_collections(repo: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FIRST], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_other_objects_are_not_excluded() -> None:
    """Torch has been imported before, as in the second job of a sweep, which must not keep the objects of the first."""
    before = gc.get_freeze_count()
    with imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == before
