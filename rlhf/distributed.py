"""Collective operations over all processes of a run. In a single process, each of them returns its argument."""

import atexit
import os
import signal
import sys
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from rlhf.process.launch import rank_in_environment

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes; 1 if the run is not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_rank() -> int:
    """Return the rank of this process; 0 if the run is not distributed.

    Before the processes are connected, this is the rank that torchrun, SLURM or Lightning has put into the environment.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return rank_in_environment()


def is_rank_zero() -> bool:
    """Return whether this is the process that writes files; True if the run is not distributed."""
    return get_rank() == 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, without gradient. The tensor has the same shape on each rank."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    if dist.get_backend() == "nccl":  # It communicates between GPUs only.
        total = total.cuda()
    dist.all_reduce(total)
    return total.to(tensor.device)


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, in the order of the ranks, on every rank. Values may be any Python objects."""
    if world_size() == 1:
        return [value]
    gathered: list[T] = [value] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def disconnect() -> None:
    """Close the connection between the ranks, if there is one. Otherwise, a process may be aborted when it exits."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until all ranks have called this function."""
    if world_size() > 1:
        dist.barrier()


# Failures

FAILURES, EXIT_CODE = "rlhf/failures", "rlhf/exit_code"  # keys of the store that all ranks share


_launchers: list[Any] = []  # launchers of Lightning, whose ``procs`` are the ranks that this process has started


def remember_launcher(launcher: Any) -> None:
    """Let the ranks that a launcher of Lightning starts end with this process if it fails."""
    if hasattr(launcher, "procs"):
        _launchers.append(launcher)


def leave_at_exit(exit_code: int) -> None:
    """After a failure, end this process at its exit without closing the connection to the other ranks.

    Closing a connection of NCCL waits for the other ranks, which may be in a collective operation that this rank does
    not join. Nothing changes with other backends.

    Args:
        exit_code: Exit code of this process.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_backend() != "nccl":
        return

    def leave() -> None:
        for launcher in _launchers:
            launcher.kill(signal.SIGKILL)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(exit_code)

    atexit.register(leave)  # The function that is registered last runs first.


def announce_failure(exit_code: int) -> int | None:
    """Announce to the other ranks that this one ends with an error.

    Returns:
        None if this is the first failure, which has to be reported. Otherwise this failure is a consequence, and the
        result is the exit code of the first one.
    """
    store = _store()
    if store is None:
        return None
    try:
        if store.add(FAILURES, 1) == 1:
            store.set(EXIT_CODE, str(exit_code))
            return None
        store.wait([EXIT_CODE], timedelta(seconds=10))
        return int(store.get(EXIT_CODE))
    except RuntimeError:  # Rank 0, which serves the store, has ended.
        return exit_code if get_rank() else None


def announced_failure() -> int | None:
    """Return the exit code of a rank that has announced a failure; None if there is none."""
    store = _store()
    try:
        return int(store.get(EXIT_CODE)) if store is not None and store.check([EXIT_CODE]) else None
    except RuntimeError:
        return None


def _store() -> Any:
    """Return the store that all ranks share: that of the process group, or of torchrun before there is a group."""
    if dist.is_available() and dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    distributed: Any = dist
    try:
        timeout = timedelta(seconds=10)
        return distributed.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    except RuntimeError:
        return None
