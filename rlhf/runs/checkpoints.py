"""The step of a checkpoint, read without torch."""

import pickletools
import zipfile
from pathlib import Path

READ_BYTES = 1 << 20  # The step is among the first entries of a checkpoint.
MEMO = ("BINPUT", "LONG_BINPUT", "MEMOIZE")  # opcodes that may stand between a key and its value


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer step of a checkpoint: a file, or the directory that ``trainer=fsdp`` writes.

    The pickle in the file is read as a list of opcodes, and none of them is executed. This takes milliseconds, while
    importing torch takes seconds.

    Raises:
        ValueError: The file is incomplete, or it is not a checkpoint.
        OSError: The file cannot be read.
    """
    try:
        with zipfile.ZipFile(checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                opcodes = pickletools.genops(file.read(READ_BYTES))
        values = ((opcode.name, value) for opcode, value, _ in opcodes if opcode.name not in MEMO)
        for _, value in values:
            if value == "global_step":
                kind, step = next(values)
                if kind.startswith("BININT") and step is not None:
                    return int(step)
    except (zipfile.BadZipFile, StopIteration, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{checkpoint} is not a complete checkpoint.") from error
    raise ValueError(f"{checkpoint} has no step.")
