"""The harness of tests with several processes: a function or a ``train.py`` command as ranks that communicate by gloo.

A typical test runs a function of the same file in two processes and compares what the ranks return:

    def total(rank: int, value: float) -> float:
        return float(sum_over_ranks(torch.tensor(value * (rank + 1))))

    def test_sum() -> None:
        assert in_ranks(total, 2.0) == [6.0, 6.0]

- The process group exists when the function is called. ``lightning.Trainer`` uses it with the flags ``DDP``.
- A start takes about a second. Put the work of several tests into one function, and call ``in_ranks`` in a fixture of
  module scope.
"""

import importlib.util
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from forked import kill_group, start_python

REPO = Path(__file__).parents[1]
RANKS = 2
DDP_OVERRIDES = ("trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={RANKS}", "trainer.precision=32-true")
DDP = {"accelerator": "cpu", "strategy": "ddp", "devices": RANKS}  # flags of lightning.Trainer


def in_ranks(function: Callable[..., Any], *arguments: Any, ranks: int = RANKS, timeout: float = 240) -> list[Any]:
    """Call ``function(rank, *arguments)`` in processes of a gloo group, and return its result on each rank.

    Args:
        function: A function at the top level of a file.
        arguments: Further arguments. They and the results are pickled.
        ranks: Number of processes.
        timeout: Seconds after which the processes are killed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(arguments, folder / "arguments.pt")
        call = [__file__, function.__code__.co_filename, function.__qualname__, name]
        outputs = run_at_once([call] * ranks, [rank_environment(rank, ranks) for rank in range(ranks)], timeout)
        assert [code for code, _ in outputs] == [0] * ranks, "\n\n".join(text[-5000:] for _, text in outputs)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


_port = 0


def rank_environment(rank: int, ranks: int) -> dict[str, str]:
    """Return the variables of one rank. Rank 0 comes first: it chooses a free port."""
    global _port
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            _port = free.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")]),
    }


def train_in_ranks(root: Path, *overrides: str, torchrun: bool, timeout: float = 240) -> tuple[int, str]:
    """Run ``train.py`` on two ranks of the CPU, and return the exit code and everything that it has printed.

    Args:
        root: Directory of the outputs.
        overrides: Overrides of the command line.
        torchrun: Start both ranks with ``torchrun``; otherwise Lightning starts rank 1.
        timeout: Seconds after which the processes are killed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"] if torchrun else []
    command = [*launcher, "train.py", *DDP_OVERRIDES, *overrides, f"paths.root={root}"]
    (output,) = run_at_once([command], [{"COLUMNS": "200"}], timeout)
    return output


def run_at_once(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], timeout: float
) -> list[tuple[int, str]]:
    """Run Python with arguments, several times at once, and return the exit code and the output of each."""
    processes = [
        start_python(command, REPO, {**os.environ, "OMP_NUM_THREADS": "1", **own}, merged=True)
        for command, own in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            kill_group(process.pid)
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def _main(file: str, function: str, folder: str) -> None:
    """Call the function as the rank that the environment names."""
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("rank_functions", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["rank_functions"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    arguments = torch.load(Path(folder, "arguments.pt"), weights_only=False)
    torch.save(getattr(module, function)(rank, *arguments), Path(folder, f"{rank}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
