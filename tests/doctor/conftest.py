"""Files of rows, read as ``stage=doctor`` reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.parser import RecordParser
from rlhf.data.reading import RecordReader
from rlhf.doctor.forms import Split, read_split


@pytest.fixture
def split(tmp_path: Path) -> Callable[..., Split]:
    """Write rows, or lines of bytes, to ``<name>.jsonl`` and read them."""

    def write_and_read(*rows: Any, name: str = "train") -> Split:
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
        return read_split(name, str(path), RecordReader(RecordParser()))

    return write_and_read
