"""Memory that is freed in one step is used again in the next one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The page faults of ten rounds that allocate, fill and free 64 MiB.
COUNT = """
import resource, sys
import torch
from rlhf.process.heap import keep_heap, release_heap
kept = keep_heap() if sys.argv[1] == "keep" else False
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
second = faults()
release_heap()
print(kept, second)
"""


KEEP = "from rlhf.process.heap import keep_heap; print(keep_heap())"


def run(repo: Path, *arguments: str, **environment: str) -> list[str]:
    """Run code in a new process and return the words that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", *arguments],
        cwd=repo,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_a_kept_heap_has_no_page_faults(repo: Path) -> None:
    """64 MiB are 16,384 pages of 4 KiB, or 32 huge pages, in each of the ten rounds."""
    kept, faults = run(repo, COUNT, "keep")
    assert kept == "True"
    _, without = run(repo, COUNT, "leave")
    assert int(faults) < int(without) / 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_settings_of_the_user_are_respected(repo: Path, name: str) -> None:
    value = "65536" if name.startswith("MALLOC") else "glibc.malloc.trim_threshold=65536"
    assert run(repo, KEEP, **{name: value}) == ["False"]
    assert run(repo, KEEP) == ["True"]


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf.process.heap import keep_heap

    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert not keep_heap()
