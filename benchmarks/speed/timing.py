"""What every side measures: the time, the page faults and the memory of its optimizer steps."""

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch

WARM_UP = 2  # steps that are not measured


class Steps:
    """Records the end of every step.

    Args:
        path: File to write after every step.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.steps: list[dict[str, float]] = []
        self.rows: list[list[int]] = []
        self.computed = 0  # tokens, padding included, that the trunk has processed with gradients in this step

    def watch(self, trunk: Any) -> None:
        """Count the tokens that a trunk processes with gradients."""

        def count(module: Any, arguments: tuple[Any, ...], keys: dict[str, Any]) -> None:
            inputs = [value for value in (*arguments, *keys.values()) if hasattr(value, "numel")]
            if torch.is_grad_enabled() and inputs:
                self.computed += (keys.get("input_ids") if keys.get("input_ids") is not None else inputs[0]).numel()

        trunk.register_forward_pre_hook(count, with_kwargs=True)

    def end(
        self,
        sequences: int,
        tokens: int,
        rows: list[int] | None = None,
        flops: float = 0.0,
        flop_seconds: float | None = None,
    ) -> None:
        """Record the end of a step.

        Args:
            sequences: Number of its rows, pairs or episodes.
            tokens: Number of its real tokens.
            rows: Numbers of its rows in the data, from 0.
            flops: Useful floating-point operations.
            flop_seconds: Seconds that they took. None: those of the whole step.
        """
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.steps.append(
            {
                "time": time.perf_counter(),
                "sequences": sequences,
                "tokens": tokens,
                "computed": self.computed,
                "wall": time.time(),
                "flops": flops,
                "flop_seconds": flop_seconds or 0.0,
                "faults": usage.ru_minflt,
                "own": usage.ru_utime + usage.ru_stime,
                "all": _busy_seconds(),
            }
        )
        self.computed = 0
        self.rows.append(rows or [])
        self.path.write_text(json.dumps({**self.summary(), "rows": self.rows}))

    def summary(self) -> dict[str, float]:
        """Return means over the measured steps, and the peak memory of the process in MiB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if len(self.steps) <= WARM_UP:
            return {"peak": peak}
        first, last, count = self.steps[WARM_UP - 1], self.steps[-1], len(self.steps) - WARM_UP
        seconds = last["time"] - first["time"]
        others = (last["all"] - first["all"]) - (last["own"] - first["own"])
        return {
            "sequences_per_s": sum(step["sequences"] for step in self.steps[WARM_UP:]) / seconds,
            "tokens_per_s": sum(step["tokens"] for step in self.steps[WARM_UP:]) / seconds,
            "flops_per_s": sum(step["flops"] for step in self.steps[WARM_UP:])
            / (sum(step["flop_seconds"] for step in self.steps[WARM_UP:]) or seconds),
            "computed_per_token": sum(step["computed"] for step in self.steps[WARM_UP:])
            / max(sum(step["tokens"] for step in self.steps[WARM_UP:]), 1),
            "first_step": self.steps[0]["wall"],
            "faults_per_step": (last["faults"] - first["faults"]) / count,
            "peak": peak,
            "others": max(others, 0.0) / seconds / (os.cpu_count() or 1),
        }


def _busy_seconds() -> float:
    """Return the processor time that all processes of the machine have taken."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _, _, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def tokens_of(batch: Any) -> int:
    """Return the number of real tokens of one of our batches."""
    return int(batch.token_count)
