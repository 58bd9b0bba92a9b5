"""How a ``*_final.pt`` was made, read without torch."""

import json
import pickletools
import zipfile
from pathlib import Path
from typing import Any

READ_BYTES = 64 << 20  # a limit: the description of a large tokenizer takes a few megabytes
MEMO = ("BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT")  # opcodes that may follow a key
STRINGS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE")


def read_provenance(path: Path) -> dict[str, Any]:
    """Return stage, inputs, data, configuration and versions of the result of a stage.

    The pickle in the file is read as a list of opcodes, and none of them is executed. This takes milliseconds, while
    importing torch takes seconds.

    Raises:
        ValueError: The file is incomplete, or it contains no provenance.
        OSError: The file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                found = json.loads(_text_after_key(file.read(READ_BYTES)))
    except (zipfile.BadZipFile, StopIteration, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a complete result of a stage.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} contains no provenance.")
    return found


def _text_after_key(pickle: bytes) -> str:
    """Return the string that follows the string ``provenance``."""
    values = ((opcode.name, value) for opcode, value, _ in pickletools.genops(pickle) if opcode.name not in MEMO)
    for kind, value in values:
        if kind in STRINGS and value == "provenance":
            kind, value = next(values)
            if kind in STRINGS:
                return str(value)
    raise StopIteration
