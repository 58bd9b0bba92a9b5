"""Atomic writes and hashes of files."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from rlhf import files
from rlhf.files import atomic_write, is_locked, remove_if_empty, replace_link, sha256_of_file


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_file_is_written_in_a_new_directory(tmp_path: Path, concurrent: bool) -> None:
    path = tmp_path / "a" / "b" / "file"
    atomic_write(path, lambda file: file.write(b"content"), concurrent=concurrent)
    assert path.read_bytes() == b"content"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("concurrent", [False, True])
def test_an_existing_file_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path, concurrent: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: IO[bytes]) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    atomic_write(path, write, concurrent=concurrent)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_no_trace(tmp_path: Path, error: type[BaseException], concurrent: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: IO[bytes]) -> None:
        file.write(b"incomplete")
        raise error

    with pytest.raises(error):
        atomic_write(path, write, concurrent=concurrent)
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize(
    ("concurrent", "name"), [(False, "file.part"), (True, f"file.{os.getpid()}.part")], ids=["alone", "concurrent"]
)
def test_concurrent_writers_use_different_names(tmp_path: Path, concurrent: bool, name: str) -> None:
    """The process id is part of the temporary name."""
    names: list[str] = []
    atomic_write(tmp_path / "file", lambda file: names.append(Path(file.name).name), concurrent=concurrent)
    assert names == [name]


def test_the_content_is_flushed_to_disk_before_the_file_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a loss of power could leave an empty file under the final name."""
    calls: list[str] = []

    def record(name: str) -> Any:
        original = getattr(os, name)

        def call(*args: Any) -> Any:
            calls.append(name)
            return original(*args)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(files.os, name, record(name))
    atomic_write(tmp_path / "file", lambda file: file.write(b"content"))
    assert calls == ["fsync", "replace", "fsync"]  # The second fsync is that of the directory.


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("write", ["plain", "torch"])
def test_a_full_disk_is_reported_with_the_name_of_the_file(tmp_path: Path, monkeypatch: Any, write: str) -> None:
    """PyTorch's writer raises a RuntimeError that does not mention the disk."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    opened = open
    monkeypatch.setattr("builtins.open", lambda name, mode: opened("/dev/full", mode) if mode == "wb" else opened(name))

    def write_content(file: IO[bytes]) -> None:
        if write == "plain":
            file.write(bytes(1 << 20))
        else:
            torch.save({"weights": torch.zeros(1 << 18)}, file)

    with pytest.raises(OSError, match="No space left on device") as caught:
        atomic_write(path, write_content)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("previous", ["absent", "other", "same", "directory"])
def test_a_link_is_replaced_and_leaves_no_other_file(tmp_path: Path, previous: str) -> None:
    target, path = tmp_path / "target", tmp_path / "path"
    target.write_bytes(b"content")
    if previous == "same":  # As after a run that was killed between the two steps of a checkpoint.
        os.link(target, path)
    elif previous == "other":
        path.write_bytes(b"older")
    elif previous == "directory":  # A checkpoint of trainer=fsdp.
        path.mkdir()
        (path / "shard").write_bytes(b"older")
    replace_link(path, target)
    assert path.samefile(target)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["path", "target"]


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    """Also of a file that is longer than one block of 1 MiB. There is none for a directory or a missing file."""
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert sha256_of_file(tmp_path) is None
    assert sha256_of_file(str(tmp_path / "nothing")) is None
    assert sha256_of_file("") is None


HOLD_LOCK = (
    "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(1, flush=True); input()"
)


def test_a_lock_is_held_by_a_living_process_only(tmp_path: Path) -> None:
    """A process that is killed leaves its file, but not its lock."""
    path = tmp_path / ".lock"
    assert not is_locked(path), "there is no file"
    command = [sys.executable, "-c", HOLD_LOCK, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert is_locked(path)
        assert is_locked(path), "looking does not take the lock"
        holder.kill()
    assert path.is_file()
    assert not is_locked(path)


def test_empty_directories_are_deleted_up_to_a_link(tmp_path: Path) -> None:
    """A run may be a link to a directory on another disk."""
    (tmp_path / "disk" / "sft" / "csv").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    remove_if_empty(tmp_path / "run" / "sft" / "csv", tmp_path / "run")
    assert (tmp_path / "run").is_symlink()
    assert list((tmp_path / "disk").iterdir()) == []
