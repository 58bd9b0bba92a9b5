"""Files of ``torch.save``, read without torch."""

import pickletools
import zipfile
from pathlib import Path
from typing import Any

MEMO = ("BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT")  # opcodes that may follow a key


def value_after(path: Path, key: str, read_bytes: int) -> Any:
    """Return the string or number that follows a key in a file of ``torch.save``; None if there is none.

    The pickle in the file is read as a list of opcodes, and none of them is executed. This takes milliseconds, while
    importing torch takes seconds.

    Args:
        path: The file.
        key: The key.
        read_bytes: Number of bytes of the pickle that are read.

    Raises:
        ValueError: The file is incomplete.
        OSError: The file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                opcodes = pickletools.genops(file.read(read_bytes))
        values = (value for opcode, value, _ in opcodes if opcode.name not in MEMO)
        for value in values:
            if value == key:
                return next(values)
    except (zipfile.BadZipFile, StopIteration, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is incomplete.") from error
    return None
