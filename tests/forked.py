"""Run Python in processes that are forked from one that has imported the slow packages.

Importing them takes most of the time of a short script. Each process imports the modules of this project.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
# The packages that scripts import, and the modules of transformers that are imported when a model is built.
PRELOADED = [
    *("hydra", "lightning.pytorch", "peft", "torch.testing", "torch.utils.tensorboard", "transformers.modeling_utils"),
    *("transformers.models.llama.modeling_llama", "transformers.models.mamba2.modeling_mamba2"),
]
_context: Any = None


def run_python(
    arguments: Sequence[str], directory: Path, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run Python like ``subprocess.run([sys.executable, *arguments], cwd=directory, env=environment)``.

    Args:
        arguments: Path of a script, relative to ``directory``, or ``-m`` and a module, or ``-c`` and code; and its
            arguments.
        directory: Working directory.
        environment: Environment variables. Packages that have been imported may have read those of this process.

    Returns:
        Exit code, standard output and standard error.
    """
    process = start_python(arguments, directory, environment)
    try:
        output, error = process.communicate()
    finally:
        kill_group(process.pid)
    return subprocess.CompletedProcess(arguments, process.returncode, output, error)


def start_python(
    arguments: Sequence[str], directory: Path, environment: Mapping[str, str] = os.environ, *, merged: bool = False
) -> Any:
    """Start Python in a new process group, which the caller has to end with ``kill_group`` if it may not end alone.

    Args:
        arguments: As for ``run_python``.
        directory: Working directory.
        environment: Environment variables.
        merged: Whether the standard error goes to the standard output.

    Returns:
        The process, with some of the methods of ``subprocess.Popen``.
    """
    if CAN_FORK:
        return ForkedPython(arguments, directory, environment, merged)
    error = subprocess.STDOUT if merged else subprocess.PIPE
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=error, text=True)


class ForkedPython:
    """A process of ``start_python``."""

    def __init__(self, arguments: Sequence[str], directory: Path, environment: Mapping[str, str], merged: bool) -> None:
        self.args = arguments
        pipes = [_forkserver().Pipe(duplex=False) for _ in range(1 if merged else 2)]
        self._readers, writers = ([pipe[end] for pipe in pipes] for end in range(2))
        target = (arguments, directory, dict(environment), writers)
        self._process = _forkserver().Process(target=_run, args=target)
        self._process.start()
        self.pid: int = self._process.pid
        for writer in writers:
            writer.close()

    def poll(self) -> int | None:
        """Return the exit code, or minus the number of the signal that has ended the process; None while it runs."""
        code: int | None = self._process.exitcode
        return code

    @property
    def returncode(self) -> int | None:
        """What ``poll`` returns, under the name that ``subprocess.Popen`` has for it."""
        return self.poll()

    def communicate(self, timeout: float = float("inf")) -> list[str]:
        """Return the output, and the error unless they are merged, when no process can write to them any more."""
        end, texts = time.monotonic() + timeout, [bytearray() for _ in self._readers]
        pending = list(self._readers)
        while pending:
            left = None if timeout == float("inf") else max(0.0, end - time.monotonic())
            ready = wait(pending, left)
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout, b"".join(texts))
            for reader in ready:
                found = os.read(reader.fileno(), 2**16)
                texts[self._readers.index(reader)] += found
                if not found:
                    pending.remove(reader)
        self._process.join()
        return [text.decode(errors="replace") for text in texts]


def kill_group(process: int) -> None:
    """End the processes of a group, where groups exist."""
    if not CAN_FORK:
        return
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def _forkserver() -> Any:
    global _context
    if _context is None:
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(PRELOADED)
    return _context


def _run(
    arguments: Sequence[str], directory: Path, environment: Mapping[str, str], writers: Sequence[Connection]
) -> None:
    """Run Python's arguments in this process."""
    gc.freeze()  # The collector need not visit what has been imported, nor copy the pages that it is in.
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell starts background jobs with SIGINT ignored.
    for descriptor in (1, 2):
        os.dup2(writers[min(descriptor, len(writers)) - 1].fileno(), descriptor)
    for writer in writers:
        writer.close()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [folder for folder in sys.path if folder not in ("", str(Path(__file__).parent))]
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    _execute(arguments, directory)


def _execute(arguments: Sequence[str], directory: Path) -> None:
    """Do what ``python`` does with its arguments."""
    first, *others = arguments
    if first == "-m":
        sys.argv[:] = others
        sys.path.insert(0, str(directory))
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv[:] = [first, *others[1:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec"), vars(main))
    else:
        sys.argv[:] = arguments
        script = Path(directory, first)
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
