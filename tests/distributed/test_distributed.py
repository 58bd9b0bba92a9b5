"""Collective operations, and the harness of tests with several processes."""

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf.export.file
from contract.configs import compose_config
from harness import TinyRun
from ranks import in_ranks
from rlhf import artifacts
from rlhf.distributed import gather_objects, sum_over_ranks, world_size
from rlhf.export import Export
from rlhf.logs import log_file
from rlhf.stage import Result


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


def collect(rank: int, offset: float) -> dict[str, Any]:
    return {
        "world": world_size(),
        "sum": sum_over_ranks(torch.tensor([rank + offset, 1.0])).tolist(),
        "objects": gather_objects({"rank": rank}),
    }


def test_every_rank_gets_the_values_of_all_ranks() -> None:
    expected = {"world": 2, "sum": [21.0, 2.0], "objects": [{"rank": 0}, {"rank": 1}]}
    assert in_ranks(collect, 10.0) == [expected, expected]


def test_one_process_gets_its_own_values() -> None:
    assert collect(0, 10.0) == {"world": 1, "sum": [10.0, 1.0], "objects": [{"rank": 0}]}


def export(rank: int, folder: Path, tiny_run: TinyRun) -> tuple[list[str], str]:
    """Export a result while writing a file takes a second. Return the exported files that the rank finds afterwards."""
    write = artifacts.atomic_write

    def write_slowly(*arguments: Any) -> None:
        time.sleep(1)
        write(*arguments)

    rlhf.export.file.atomic_write = artifacts.atomic_write = write_slowly  # type: ignore[assignment]
    cfg = compose_config("stage=dpo", f"paths.root={folder}")
    with log_file(folder / f"{rank}.log"):
        artifacts.export_result(cfg, folder / "rlhf" / "dpo", Result(tiny_run.lm, tiny_run.tokenizer), {})
        logging.getLogger("rlhf.run").warning("a warning")
    return sorted(path.name for path in folder.rglob("*.pt")), Export(f"{folder}/rlhf/dpo/dpo_final.pt").kind


def test_all_ranks_wait_until_rank_0_has_exported(tmp_path: Path, tiny_run: TinyRun) -> None:
    """The next step of a pipeline opens these files on every rank. Only rank 0 writes a log."""
    expected = (["dpo_final.pt", "final_rl_model.pt"], "language_model")
    assert in_ranks(export, tmp_path, tiny_run) == [expected, expected]
    assert [path.name for path in tmp_path.glob("*.log")] == ["0.log"]
    assert "saved" in (tmp_path / "0.log").read_text()


# The harness


def fail_on_rank_1(rank: int) -> None:
    assert rank == 0, "a fault on rank 1"


def test_an_error_on_a_rank_fails_the_test() -> None:
    """The harness reports what the rank has printed."""
    with pytest.raises(AssertionError, match="a fault on rank 1"):
        in_ranks(fail_on_rank_1)
