"""Lightning callbacks that connect training to exports and to the pre-flight checks."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import nn

from rlhf.distributed import barrier, gather_objects, is_rank_zero
from rlhf.errors import ConfigError
from rlhf.export import Export, describe, save_result
from rlhf.export.huggingface import check_huggingface
from rlhf.preflight import run_preflight
from rlhf.stage import Result

log = logging.getLogger(__name__)


class ExportHeader(Callback):
    """Adds to every checkpoint what is needed to open its model without the run.

    Args:
        provenance: How the model is made; see ``rlhf.artifacts.describe_provenance``.
    """

    def __init__(self, provenance: dict[str, Any]) -> None:
        self.provenance = provenance

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["rlhf"] = describe(module.result(), self.provenance)


class CheckFolder(Callback):
    """Warns before training starts if ``save_hf`` cannot write the result as a Hugging Face folder.

    This is not an error, because in a pipeline, ``save_hf`` asks for the folders of the policies as well.
    """

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        try:
            check_huggingface(module.result())
        except ConfigError as error:
            log.warning("%s", error)


class PreflightChecks(Callback):
    """Runs the pre-flight checks of a stage before it trains.

    Args:
        output: Directory of the stage; a result is saved there temporarily to check that it can be loaded.
        provenance: See ``ExportHeader``.
        only: Stop after the checks by raising ``PreflightOnly``.
    """

    def __init__(self, output: Path, provenance: dict[str, Any], only: bool) -> None:
        self.output = output
        self.provenance = provenance
        self.only = only

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        run_preflight(module, self.reload)
        if self.only:
            raise PreflightOnly

    def reload(self, result: Result) -> nn.Module:
        """Save a result to a temporary file and open it again."""
        path = self.output / "check.pt"
        self._save(result, path)
        try:
            export = Export(str(path))
            if export.kind == "scalar_model":
                return export.scalar_model(result.tokenizer)
            return export.language_model(result.tokenizer)
        finally:
            barrier()
            if is_rank_zero():
                path.unlink()

    def _save(self, result: Result, path: Path) -> None:
        """Save a result. Rank 0 writes the file for all ranks, so its failure is an error on each of them."""
        failure: Exception | None = None
        try:
            save_result(result, path, self.provenance)
        except Exception as error:  # Any error: the other ranks wait here.
            failure = error
        reasons = [reason for reason in gather_objects(failure and str(failure)) if reason is not None]
        if failure is not None:
            raise failure
        if reasons:
            raise OSError(reasons[0])


def check_averaging(callbacks: Iterable[Callback]) -> None:
    """Reject Lightning's ``StochasticWeightAveraging``, which copies a module before the stage opens its models.

    Raises:
        ConfigError: It would average nothing.
    """
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise ConfigError(
            "callbacks: StochasticWeightAveraging is not supported: it copies the model before the stage opens it, so "
            "it would average nothing.",
            "Use EMAWeightAveraging of Lightning instead.",
        )


def log_early_stopping(trainer: lightning.Trainer) -> None:
    """Log why ``EarlyStopping`` has ended training, which Lightning does with ``verbose=true`` only."""
    for callback in trainer.early_stopping_callbacks:
        reason = getattr(callback, "stopping_reason_message", None)
        if trainer.should_stop and reason is not None and not getattr(callback, "verbose", False):
            log.info("%s", reason)


class PreflightOnly(Exception):
    """The checks have passed, and ``check=only`` asks for no training."""
