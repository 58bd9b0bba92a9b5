"""Names of runs and jobs: plain directory names, so that no command writes outside of its folder of outputs."""

import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from rlhf.errors import ConfigError
from rlhf.overrides import to_override

OUTPUTS, RUN = "outputs", "rlhf"  # the default directory of all runs, and the default run
MAX_RUN_NAME, MAX_JOB_NAME = 200, 100  # bytes; file systems allow 255
_ONLY_JOB = "job"  # name of the job of a sweep that iterates over nothing
# They do not distinguish the jobs of a sweep, unless it iterates over them.
_LEFT_OUT = frozenset({"stage", "run", "experiment", "paths.root", "resume", "overwrite"})
swept_keys: set[str] = set()  # what the current sweep iterates over; ``SweepTable`` sets it
_NAME = re.compile(r"\w[\w.,+=@ -]*")


def check_run_name(name: object) -> None:
    """Reject a value of ``run`` that is not the plain name of a directory.

    Raises:
        ConfigError: It is empty or too long, or contains a path separator, a colon or a control character.
    """
    if name is None or not _NAME.fullmatch(str(name)) or len(str(name).encode()) > MAX_RUN_NAME:
        raise ConfigError(
            f"run must be a plain name of letters, digits, '_', '-' and '.' with at most {MAX_RUN_NAME} bytes, "
            f"got {name!r}.",
            "Set run=<name>. For another directory of all runs: paths.root=<directory>",
        )


def check_run_override(arguments: Sequence[str]) -> None:
    """Reject ``run=../x`` in a command line before Hydra creates the directory.

    The value may be a list for a sweep, so only separators are looked for. ``check_run_name`` checks each name later.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        name = value.strip("'\"")
        if key.lstrip("+") == "run" and (not name or name.startswith(".") or re.search(r"[/\\:]", name)):
            check_run_name(name)


def command_in_run(directory: Path, *overrides: str) -> str:
    """Return the command line with overrides for the run in a directory."""
    root = [] if directory.parent == Path(OUTPUTS) else [to_override("paths.root", directory.parent)]
    return shlex.join(["python", "train.py", *overrides, to_override("run", directory.name), *root])


def job_name(overrides: str) -> str:
    """Return a short name for the directory of a job of a sweep.

    The keys that the sweep iterates over come first. The stage and the name of the run are left out, unless the sweep
    iterates over them. Keys are shortened to their last part where this is unambiguous.
    Where something else has to be left out, a hash of the overrides keeps the names of two jobs different.

    Args:
        overrides: The overrides of the job as Hydra joins them: ``stage.beta=0.1,loss=ipo``.
    """
    items = [item.partition("=") for item in re.split(r",(?=[\w.@/+~]+=)", overrides)]
    pairs = [item for item in items if item[0] not in _LEFT_OUT - swept_keys]
    overrides = ",".join(map("".join, pairs))
    pairs.sort(key=lambda pair: pair[0] not in swept_keys)
    short = Counter(key.rpartition(".")[2] for key, _, _ in pairs)
    names = [(key.rpartition(".")[2] if short[key.rpartition(".")[2]] == 1 else key, value) for key, _, value in pairs]
    full = ",".join(f"{key}={value}" if value else key for key, value in names) or _ONLY_JOB
    # Numbers that a sweeper has drawn have up to 17 digits.
    rounded = re.sub(r"\d+\.\d{6,}(e[-+]?\d+)?", lambda number: f"{float(number[0]):.4g}", full)
    name = re.sub(r"[^\w.,=+@-]+", "_", rounded)
    encoded = name.encode()
    if name == full and len(encoded) <= MAX_JOB_NAME:
        return name
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return f"{encoded[:MAX_JOB_NAME].decode(errors='ignore').rstrip('.,_')}-{digest}"


OmegaConf.register_new_resolver("job_name", job_name, replace=True)
