"""Run Python scripts in processes that are forked from one that has imported the slow packages.

Importing them takes most of the time of a short ``train.py``. Modules of this project are imported by each script.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PRELOADED = ["lightning.pytorch", "torch.utils.tensorboard", "transformers.modeling_utils"]
_context: Any = None


def run_script(
    arguments: Sequence[str], directory: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a script like ``subprocess.run([sys.executable, *arguments], cwd=directory, env=environment)``.

    Args:
        arguments: Path of the script, relative to ``directory``, and its arguments.
        directory: Working directory.
        environment: Environment variables. The number of threads is that of this process.

    Returns:
        Exit code, standard output and standard error.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name, "output"), Path(name, "error")]
        for file in files:
            file.touch()
        process = _forkserver().Process(target=_run, args=(arguments, directory, dict(environment), files))
        process.start()
        process.join()
        output, error = (file.read_text(encoding="utf-8") for file in files)
    return subprocess.CompletedProcess(arguments, process.exitcode, output, error)


def _forkserver() -> Any:
    global _context
    if _context is None:
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(PRELOADED)
    return _context


def _run(arguments: Sequence[str], directory: Path, environment: Mapping[str, str], files: Sequence[Path]) -> None:
    """Run a script in this process."""
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), descriptor)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = arguments
    script = Path(directory, arguments[0])
    sys.path[:0] = [str(script.parent), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(str(script), run_name="__main__")
