"""Reads: points where the host waits for the emulated device.

On a real accelerator the host queues operations and runs ahead of the device. A read makes it wait until everything
queued before is done, so a read per token or per layer can cost more than the computation. A copy to the device waits
as well, unless it is made with ``non_blocking=True``.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPOSITORY = Path(__file__).parents[2]
DEVICE_FILES = [str(Path(__file__).with_name(name)) for name in ("autocast.py", "device.py", "reads.py")]
# CUDA waits in these, because the shape of the result or a check of the arguments depends on values.
ALWAYS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "multinomial"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
# Callers that log metrics: path, line and function.
LOGGING = re.compile(r"step_metrics\.py|logger_connector| _?log_|metrics_to_scalars")


@dataclass(frozen=True)
class Read:
    """One read.

    Attributes:
        operation: Name of the operation, for example ``_local_scalar_dense`` for ``item``.
        stack: ``path:line function`` of the callers in this repository and in Lightning, innermost first.
    """

    operation: str
    stack: tuple[str, ...]

    @property
    def source(self) -> str:
        """The innermost caller in ``rlhf``, or the innermost one of all if there is none."""
        own = [caller for caller in self.stack if caller.startswith("rlhf/")]
        return f"{self.operation} in {(own or [*self.stack, 'an unknown place'])[0]}"

    @property
    def is_logging(self) -> bool:
        """Whether one of the callers logs metrics."""
        return any(LOGGING.search(caller) for caller in self.stack)


_recordings: list[list[Read]] = []


@contextmanager
def recorded_reads() -> Iterator[list[Read]]:
    """Yield a list that receives every read in this context."""
    reads: list[Read] = []
    _recordings.append(reads)
    try:
        yield reads
    finally:
        _recordings.remove(reads)


def summarize(reads: list[Read]) -> str:
    """Return the number of reads of each source, for the message of an assertion."""
    return "\n".join(f"{count:4d} {source}" for source, count in Counter(read.source for read in reads).most_common())


def record_read(operation: str) -> None:
    """Add a read by the caller to every recording."""
    if not _recordings:
        return
    callers = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if "/lightning/" in path:
            callers.append(f"lightning/{path.rsplit('/lightning/', 1)[1]}:{frame.f_lineno} {name}")
        elif Path(path).is_relative_to(REPOSITORY) and path not in DEVICE_FILES:
            callers.append(f"{Path(path).relative_to(REPOSITORY)}:{frame.f_lineno} {name}")
        frame = frame.f_back
    for recording in _recordings:
        recording.append(Read(operation, tuple(callers)))


def is_read(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], device: str) -> bool:
    """Return whether CUDA would wait in an operation.

    Args:
        name: Name of the operation, without namespace, overload and final underscore.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        device: Type of the device.
    """
    if name in ALWAYS:
        return True
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "copy":
        target, values = args[:2]
        is_upload = target.device.type == device and values.device.type != device
        is_download = values.device.type == device and target.device.type != device
        return is_download or (is_upload and not any(args[2:3]) and not kwargs.get("non_blocking"))
    if name in ("index", "_index_put_impl"):
        by_mask = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return by_mask and (name == "index" or args[2].numel() != 1)  # ``x[mask] = 0`` needs no positions.
    return False
