"""Checkpoint directories of ``trainer=fsdp`` from anyone: data is read, and code in them does not run."""

import pathlib
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from security.hostile import Bomb
from torch.distributed.checkpoint.state_dict_saver import save

from rlhf.checkpoint.shards import INDEX, ShardReader, load_shards
from rlhf.errors import DataError


def write(directory: Path, **further: Any) -> Path:
    values = {"weight": torch.arange(4.0, dtype=torch.bfloat16), "lr": 0.25, "betas": (0.9, 0.95), "names": ["a", None]}
    save({"state": {**values, **further}}, checkpoint_id=directory)
    return directory


def empty(**further: Any) -> dict[str, Any]:
    values = {"weight": torch.zeros(4, dtype=torch.bfloat16), "lr": 0.0, "betas": (0.0, 0.0), "names": ["", ""]}
    return {"state": {**values, **further}}


def test_tensors_and_plain_values_are_loaded(tmp_path: Path) -> None:
    state = empty()
    load_shards(state, write(tmp_path))
    assert state["state"].pop("weight").tolist() == [0.0, 1.0, 2.0, 3.0]
    assert state == {"state": {"lr": 0.25, "betas": (0.9, 0.95), "names": ["a", None]}}


def test_an_index_of_python_3_13_is_read(tmp_path: Path) -> None:
    """This version stores paths as ``pathlib._local.PosixPath``, a module that others do not have."""
    with pytest.MonkeyPatch.context() as context:
        context.setitem(sys.modules, "pathlib._local", pathlib)
        context.setattr(type(tmp_path), "__module__", "pathlib._local")
        write(tmp_path)
    assert b"pathlib._local" in (tmp_path / INDEX).read_bytes()
    state = empty()
    load_shards(state, tmp_path)
    assert state["state"]["lr"] == 0.25


def test_a_pickle_as_the_index_is_refused(tmp_path: Path) -> None:
    """PyTorch itself would run it."""
    write(tmp_path / "dcp")
    (tmp_path / "dcp" / INDEX).write_bytes(pickle.dumps(Bomb(tmp_path)))
    with pytest.raises(DataError, match=r"\.metadata: not a valid index .*system.*Nothing in it was run"):
        ShardReader(tmp_path / "dcp").read_metadata()
    with pytest.raises(DataError, match=r"not a valid index"):
        load_shards(empty(), tmp_path / "dcp")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_as_a_value_is_refused(tmp_path: Path) -> None:
    """PyTorch stores non-tensor values as pickles, and would run them."""
    write(tmp_path / "dcp", extra=Bomb(tmp_path))
    with pytest.raises(DataError, match=r"state\.extra: the value in the checkpoint is not plain data"):
        load_shards(empty(extra=0.0), tmp_path / "dcp")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../other.distcp", "/etc/passwd", "a/b.distcp", "..", "..\\x"])
def test_an_index_that_refers_to_another_directory_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    metadata = pickle.loads((tmp_path / INDEX).read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    (tmp_path / INDEX).write_bytes(pickle.dumps(metadata))
    with pytest.raises(DataError, match=r"refers to a file outside of the directory"):
        ShardReader(tmp_path).read_metadata()


@pytest.mark.parametrize("damage", [b"", b"text", pickle.dumps([1])])
def test_a_damaged_index_is_named(tmp_path: Path, damage: bytes) -> None:
    write(tmp_path)
    (tmp_path / INDEX).write_bytes(damage)
    with pytest.raises(DataError, match=r"\.metadata: not a valid index"):
        ShardReader(tmp_path).read_metadata()
