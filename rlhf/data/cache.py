"""Results of reading and encoding data, stored on disk by the content of everything they depend on."""

import hashlib
import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from rlhf.data.records import Row
from rlhf.data.row_files import open_rows
from rlhf.data.rows import Rows
from rlhf.errors import ConfigError
from rlhf.files import sha256_of_file, write_json

log = logging.getLogger(__name__)
CACHED_ROWS = 2000  # fewer rows are read and encoded within a second
_LIBRARIES = ("builtins", "lightning", "torch", "typing", "abc", "collections")
Summary = dict[str, Any]


@dataclass(frozen=True)
class DataCache:
    """A directory of results. Several processes may use it at the same time: the first one computes a result, and the
    others wait for it.

    Args:
        directory: The directory. It is made when the first result is stored.
    """

    directory: Path

    def summary(self, key: Any, compute: Callable[[], Summary]) -> Summary:
        """Return a stored summary of records, or compute and store it.

        Args:
            key: Everything that it depends on, as JSON.
            compute: Computes it.
        """
        path = self._path("records", key, "json")
        with self._lock(path):
            with usable(self.directory):
                stored = _read_json(path)
            if stored is not None:
                return stored
            summary = compute()
            with usable(self.directory):
                write_json(path, summary)
        return summary

    def rows(self, key: Any, row_type: type, compute: Callable[[Path], tuple[Rows, Summary]]) -> tuple[Rows, Summary]:
        """Return stored rows with their summary, or compute and store them.

        Args:
            key: Everything that they depend on, as JSON.
            row_type: The dataclass of the rows.
            compute: Writes the rows to the file that it receives, and returns them. It writes within ``usable``.
        """
        path = self._path("rows", key, "arrow")
        with self._lock(path):
            with usable(self.directory):
                stored = _read_rows(path, row_type)
            if stored is not None:
                log.info("Encoded rows: read from %s", path)
                return stored
            rows, summary = compute(path)
            with usable(self.directory):
                write_json(path.with_suffix(".json"), summary)  # The rows are complete if their summary exists.
            log.info("Encoded rows: stored in %s", path)
        return rows, summary

    def _path(self, kind: str, key: Any, extension: str) -> Path:
        content = json.dumps([_code(), key], sort_keys=True)
        return self.directory / f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:32]}.{extension}"

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        lock = FileLock(path.with_suffix(".lock"))
        with usable(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


@contextmanager
def usable(directory: Path) -> Iterator[None]:
    """Report an error of the operating system as one of ``data.cache_dir``.

    Reading and encoding the data happen outside of this context, because their errors have other causes.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={directory}: the directory cannot be used ({error}).",
            "Set data.cache_dir=<directory>, or data.cache_dir=null to encode the data at every start.",
        ) from error


def content_key(path: str, rows: Sequence[Row]) -> str:
    """Return what identifies the content of a file, or of a split of a Hub dataset."""
    fingerprint: str | None = getattr(rows, "_fingerprint", None)  # of ``datasets``; it depends on the path of a file
    if Path(path).is_file():
        status = Path(path).stat()
        return _hash_of_file(path, status.st_size, status.st_mtime_ns)
    return fingerprint or path


@lru_cache
def _hash_of_file(path: str, size: int, modified: int) -> str:
    return str(sha256_of_file(path))


def source_of_class(kind: type) -> str | None:
    """Return a hash of the modules that define a class and the classes that it derives from; None without a source.

    Whole modules, because the methods of a class call functions outside of it.
    """
    modules = dict.fromkeys(base.__module__ for base in kind.__mro__)
    digest = hashlib.sha256()
    try:
        for name in modules:
            if name.split(".")[0] not in _LIBRARIES:
                source = inspect.getsourcefile(sys.modules[name])
                digest.update(Path(str(source)).read_bytes())
    except (OSError, TypeError, KeyError):  # such as classes of an interactive session
        return None
    return digest.hexdigest()


@lru_cache
def _code() -> str:
    """Return a hash of the code that reads and encodes data."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_json(path: Path) -> Summary | None:
    try:
        content: Summary = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        log.warning("%s is not a valid file of the cache. It is computed again.", path)
        return None
    return content


def _read_rows(path: Path, row_type: type) -> tuple[Rows, Summary] | None:
    summary = _read_json(path.with_suffix(".json"))
    if summary is None:
        return None
    try:
        return open_rows(row_type, path), summary
    except (OSError, ValueError) as error:
        log.warning("%s is not a valid file of encoded rows (%s). They are encoded again.", path, error)
        return None
