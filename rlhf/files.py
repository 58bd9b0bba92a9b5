"""Atomic writes, locks and hashes of files."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from rlhf.errors import ConfigError

LOCK = ".lock"  # file whose lock the process that writes to a directory holds
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"  # the newest checkpoint of a run, and the one before
METADATA = "meta.pt"  # file of a checkpoint directory with all but weights and moments, as in Lightning
FINAL_MODEL = "final_rl_model.pt"  # in outputs/<run>/: what load_model("rl_trained") opens
LOGGED = ("tensorboard", "csv")  # directories of the loggers in the directory of a stage
PART = ".part"  # suffix of a file that is still being written


def atomic_write(path: Path, write: Callable[[IO[bytes]], object], *, concurrent: bool = False) -> None:
    """Write a file so that it is either complete or absent, even if the process is killed.

    The content is written to a temporary file in the same directory, flushed to disk and then renamed. An existing file
    stays intact until the new one is complete. If writing fails, the temporary file is removed.

    Args:
        path: File to write. Its directory is created if necessary.
        write: Writes the content to the binary file that it receives.
        concurrent: Several processes may write this file at the same time, so each uses its own temporary name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}" if concurrent else f"{path.name}{PART}")
    try:
        with open(part, "wb") as file:
            try:
                write(file)
            except RuntimeError:  # PyTorch's writer of archives does not report the error of the disk.
                file.write(bytes(1 << 16))
                file.flush()
                raise
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    _sync_directory(path.parent)


def replace_part(part: Path, path: Path) -> None:
    """Flush a file that has been written under another name to disk, and give it its final name."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_directory(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file with ``atomic_write``."""
    data = (json.dumps(content, indent=2) + "\n").encode()
    atomic_write(path, lambda file: file.write(data))


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON Lines file with ``atomic_write``.

    A question mark replaces half of a surrogate pair. Values that JSON does not have, such as the times that a Parquet
    file may contain, become text.
    """
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    content = "".join(lines).encode(errors="replace")
    atomic_write(path, lambda file: file.write(content))


def replace_link(path: Path, target: Path) -> None:
    """Make ``path`` another name of an existing file, in place of the file or directory that has had this name.

    Where the file system has no hard links, the file is renamed.
    """
    part = path.with_name(path.name + PART)
    part.unlink(missing_ok=True)
    if path.is_dir():  # A file cannot be renamed to the name of a directory.
        remove(path)
    try:
        os.link(target, part)
    except OSError:
        os.replace(target, path)
    else:
        os.replace(part, path)
        part.unlink(missing_ok=True)  # Renaming has no effect if both names already belong to the same file.


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory during the context. A process that has ended holds no lock.

    Raises:
        ConfigError: Another process holds it.
    """
    path = directory / LOCK
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, mode=0o644)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"{directory} is in use by another process ({path.read_text().strip()}).",
            "Wait until it ends, or set run=<name> for another run.",
        ) from None
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        lock.release()


def remove(path: Path) -> None:
    """Delete a file or a directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_if_empty(directory: Path, top: Path) -> None:
    """Delete a directory if it is empty, and then those above it that are, up to ``top``. Symbolic links stay."""
    for path in (directory, *directory.parents):
        if not path.is_relative_to(top) or path.is_symlink() or not path.is_dir() or any(path.iterdir()):
            break
        path.rmdir()


def sha256_of_file(path: str | Path) -> str | None:
    """Return the SHA-256 of a file as a hexadecimal string, or None if there is no such file."""
    if not Path(path).is_file():
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_locked(path: Path) -> bool:
    """Return whether a running process holds the lock on a file. A process that has ended, in any way, holds none."""
    try:
        import fcntl

        with open(path, "rb") as file:  # Closing the file gives the lock back at once.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # Windows has no such locks; or there is no such file
        return False
    return False


def _sync_directory(directory: Path) -> None:
    """Flush a renamed directory entry to disk, so that it survives a loss of power, where the system supports it."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems do not support it
        pass
    finally:
        os.close(handle)
