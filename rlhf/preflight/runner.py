"""Runs a stage's checks and shows them, without leaving a trace in what is trained."""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from rlhf.errors import UserError
from rlhf.logs import lines
from rlhf.preflight.checks import Check, check_reload
from rlhf.preflight.measurements import sample_rows, texts_of

if TYPE_CHECKING:
    from rlhf.stage import Result, StageModule

log = logging.getLogger(__name__)


class ChecksFailed(UserError):
    """The stage did not prove itself. Exit code 1: nothing is wrong with what was typed."""

    exit_code = 1


def run_preflight(module: "StageModule", reopen: Callable[["Result"], nn.Module]) -> None:
    """Run a stage's checks and show them as a table.

    Args:
        module: on its device, with trainer, data and models, before its first step.
        reopen: writes a result as a file and opens that again.

    Raises:
        ChecksFailed: one of them failed.
    """
    trainer, started = module.trainer, time.perf_counter()
    with unchanged(module):
        bar = {"total": None, "transient": True, "disable": not trainer.is_global_zero}
        checks = list(track(_all_checks(module, reopen), "checking", **bar))
    seconds = time.perf_counter() - started
    failed = [check for check in checks if not check.passed]
    for check in checks:
        verdict = "passed" if check.passed else "FAILED"
        lines.info("check %s: %s: %s (limit: %s)", verdict, check.name, check.measured, check.limit)
    if trainer.is_global_zero:
        Console().print(table(checks, seconds))
    if trainer.strategy.reduce_boolean_decision(not failed, all=True):
        log.info("%d checks passed in %.1f s", len(checks), seconds)
        return
    faults = "\n".join(f"  {check.name}: {check.measured}\n    {check.fault}" for check in failed)
    raise ChecksFailed(
        f"{len(failed)} of {len(checks)} checks failed, nothing was trained:\n{faults or '  on another device'}",
        "check=false trains all the same",
    )


def _all_checks(module: "StageModule", reopen: Callable[["Result"], nn.Module]) -> Iterator[Check]:
    datamodule = module.trainer.datamodule
    module.eval()
    yield from module.checks(datamodule)
    yield check_reload(module, texts_of(sample_rows(datamodule), datamodule).to(module.device), reopen)


def table(checks: Sequence[Check], seconds: float) -> Table:
    """Names, what was measured and what was allowed; failures stand out."""
    failures = sum(not check.passed for check in checks)
    verdict = f"{failures} failed" if failures else "all passed"
    shown = Table(title=f"check: {len(checks)} properties, {verdict}; {seconds:.1f} s", box=box.SIMPLE)
    for title in ("", "what should hold", "measured", "limit"):
        shown.add_column(title, overflow="fold")
    for check in checks:
        shown.add_row(
            "ok" if check.passed else "FAILED",
            check.name,
            check.measured,
            check.limit,
            style="" if check.passed else "bold red",
        )
    return shown


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Whatever happens inside, afterwards the module and the random state are as they were.

    Kept are the state of every random generator, which parts were in train mode, all buffers (running moments among
    them) and the module's own plain attributes. Weights and gradients are never touched by a check.
    """
    devices = list(range(torch.cuda.device_count()))
    plain, arrays = random.getstate(), numpy.random.get_state()
    modes = {part: part.training for part in module.modules()}
    buffers = {buffer: buffer.clone() for buffer in module.buffers()}
    inner = vars(nn.Module()).keys()  # the registries of parameters, buffers and parts
    attributes = {name: _copied(value) for name, value in vars(module).items() if name not in inner}
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(plain)
            numpy.random.set_state(arrays)
            for part, training in modes.items():
                part.training = training
            with torch.no_grad():
                for buffer, value in buffers.items():
                    buffer.copy_(value)
            vars(module).update(attributes)


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list) else value
