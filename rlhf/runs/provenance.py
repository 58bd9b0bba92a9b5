"""How a ``*_final.pt`` was made, read without torch."""

import json
from pathlib import Path
from typing import Any

from rlhf.runs.archives import value_after

READ_BYTES = 64 << 20  # a limit: the description of a large tokenizer takes a few megabytes


def read_provenance(path: Path) -> dict[str, Any]:
    """Return stage, inputs, data, configuration and versions of the result of a stage.

    Raises:
        ValueError: The file is incomplete, or it contains no provenance.
        OSError: The file cannot be read.
    """
    text = value_after(path, "provenance", READ_BYTES)
    found = json.loads(text) if isinstance(text, str) else None
    if not isinstance(found, dict):
        raise ValueError(f"{path} contains no provenance.")
    return found
