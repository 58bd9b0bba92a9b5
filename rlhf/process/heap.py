"""The heap of the C library: freed memory is kept for the next step instead of being returned to the system.

Tensors as large as logits are above the limit of 32 MiB up to which glibc allocates from its heap. Each of them is
mapped, zeroed and unmapped again in every step, which takes up to a fifth of the time of training on a CPU.
"""

import ctypes
import gc
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # parameters of mallopt(3)
KEPT_BYTES = 1 << 30  # free memory at the top of the heap up to which nothing is returned
ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


def keep_heap() -> bool:
    """Let glibc allocate everything from its heap, and keep up to 1 GiB that is free at the end of it.

    All threads allocate from the same heap: glibc returns the memory of the others.

    Nothing changes on other systems, if another allocator is preloaded, or if a variable of the environment
    (``GLIBC_TUNABLES``, ``MALLOC_...``) configures glibc's own.

    Returns:
        Whether the heap is kept.
    """
    mallopt = _function("mallopt")
    if mallopt is None or _is_configured():
        return False
    parameters = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: KEPT_BYTES}
    return all(mallopt(parameter, value) for parameter, value in parameters.items())


def release_heap() -> None:
    """Return free memory to the system, for example between two stages."""
    gc.collect()
    if (malloc_trim := _function("malloc_trim")) is not None and not _is_configured():
        malloc_trim(0)


def _function(name: str) -> "ctypes._NamedFuncPointer | None":
    """Return a function of glibc; None on a system with another C library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def _is_configured() -> bool:
    preloaded = os.environ.get("LD_PRELOAD", "")
    return any(name in preloaded for name in ALLOCATORS) or any(
        name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ
    )
