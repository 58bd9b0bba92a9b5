"""The step of a checkpoint, read without torch."""

from pathlib import Path

from rlhf.files import METADATA
from rlhf.runs.archives import value_after

READ_BYTES = 1 << 20  # The step is among the first entries of a checkpoint.


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer step of a checkpoint: a file, or the directory that ``trainer=fsdp`` writes.

    Raises:
        ValueError: The file is incomplete, or it is not a checkpoint.
        OSError: The file cannot be read.
    """
    step = value_after(checkpoint / METADATA if checkpoint.is_dir() else checkpoint, "global_step", READ_BYTES)
    if not isinstance(step, int):
        raise ValueError(f"{checkpoint} has no step.")
    return step
