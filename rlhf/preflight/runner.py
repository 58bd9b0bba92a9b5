"""Runs the pre-flight checks of a stage and prints them, without any effect on training."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from rlhf.data import RecordDataModule
from rlhf.errors import UserError
from rlhf.logs import metrics_log
from rlhf.preflight.checks import check_reload
from rlhf.preflight.measurements import as_sequences, sample_rows
from rlhf.printable import printable
from rlhf.stage import Result, StageModule
from rlhf.stage.check import Check
from rlhf.stage.random_state import get_random_state, set_random_state

log = logging.getLogger(__name__)


class PreflightFailed(UserError):
    """A pre-flight check failed. The exit code is 1, because the command line itself is valid."""

    exit_code = 1


def run_preflight(module: StageModule, reload: Callable[[Result], nn.Module]) -> None:
    """Run a stage's checks and print them as a table.

    Args:
        module: The stage on its device, with trainer, data and models, before its first step.
        reload: Saves a result to a file and returns the model that is loaded from it.

    Raises:
        PreflightFailed: At least one check failed, on this process or on another one.
    """
    trainer, start = module.trainer, time.perf_counter()
    checks = []
    log.info("Running the pre-flight checks of the stage")
    with preserve_state(module):
        for check in _all_checks(module, reload):
            checks.append(check)
            outcome = "passed" if check.passed else "FAILED"
            log.info("%5.1f s, check %s: %s", time.perf_counter() - start, outcome, check.name)
            metrics_log.info("%s: %s (limit: %s)", check.name, check.measured, check.limit)
    seconds = time.perf_counter() - start
    failed = [check for check in checks if not check.passed]
    if trainer.is_global_zero:
        Console().print(check_table(checks, seconds))
    if trainer.strategy.reduce_boolean_decision(not failed, all=True):
        log.info("%d checks passed in %.1f s", len(checks), seconds)
        return
    faults = "\n".join(f"  {check.name}: {check.measured}\n    {check.fault}" for check in failed)
    raise PreflightFailed(
        f"{len(failed)} of {len(checks)} pre-flight checks failed. Nothing was trained.\n"
        f"{faults or '  The failure is on another process.'}",
        "Set check=false to train anyway.",
    )


def _all_checks(module: StageModule, reload: Callable[[Result], nn.Module]) -> Iterator[Check]:
    datamodule: RecordDataModule = module.trainer.datamodule  # type: ignore[attr-defined]
    module.eval()
    yield from module.preflight_checks(datamodule)
    yield check_reload(module, as_sequences(sample_rows(datamodule, 4), datamodule).to(module.device), reload)


def check_table(checks: Sequence[Check], seconds: float) -> Table:
    """Return a table of names, measurements and limits, with failures highlighted."""
    failures = sum(not check.passed for check in checks)
    outcome = f"{failures} failed" if failures else "all passed"
    table = Table(title=f"{len(checks)} pre-flight checks, {outcome}, {seconds:.1f} s", box=box.SIMPLE)
    for title in ("", "check", "measured", "limit"):
        table.add_column(title, overflow="fold")
    for check in checks:
        style = "" if check.passed else "bold red"
        cells = ("ok" if check.passed else "FAILED", check.name, check.measured, check.limit)
        table.add_row(*(Text(printable(cell)) for cell in cells), style=style)
    return table


@contextmanager
def preserve_state(module: nn.Module) -> Iterator[None]:
    """Restore a module and the random state on exit.

    This covers all random number generators, train and eval modes, buffers, extra state such as running moments, and
    the module's plain attributes. Checks never change weights or gradients.
    """
    random_state = get_random_state()
    modes = {part: part.training for part in module.modules()}
    buffers = {buffer: buffer.clone() for buffer in module.buffers()}
    has_extra_state = [part for part in module.modules() if type(part).get_extra_state is not nn.Module.get_extra_state]
    extra_states = [part.get_extra_state() for part in has_extra_state]
    registries = vars(nn.Module()).keys()  # Those of parameters, buffers, submodules and hooks.
    attributes = {name: _shallow_copy(value) for name, value in vars(module).items() if name not in registries}
    try:
        yield
    finally:
        set_random_state(random_state)
        for part, training in modes.items():
            part.training = training
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for part, state in zip(has_extra_state, extra_states, strict=True):
            part.set_extra_state(state)
        vars(module).update(attributes)


def _shallow_copy(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list) else value
