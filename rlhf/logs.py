"""The plain-text log of a stage: messages and metrics in one file."""

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from rlhf.distributed import is_rank_zero

metrics_log = logging.getLogger("rlhf.metrics")  # written to <stage>.log, but not to the terminal
# Loggers of Lightning whose messages users ask for by a setting, and how these messages begin.
REPORTS = {
    "lightning.pytorch.profilers.profiler": "",
    "lightning.pytorch.callbacks.early_stopping": "",
    "lightning.pytorch.tuner.lr_finder": "Learning rate set to",
    "lightning.pytorch.utilities.rank_zero": "Time limit reached",
}


class TextLogger(Logger):
    """Lightning logger that writes the metrics of each step as one line of ``<stage>.log``."""

    @property
    def name(self) -> str:
        return "text"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = (f"{name}={value:.6g}" for name, value in sorted(metrics.items()) if name != "epoch")
        metrics_log.info("step=%s %s", step, " ".join(values))

    @rank_zero_only
    def log_text(self, text: str, step: int) -> None:
        """Write a text of several lines, such as a table of samples."""
        metrics_log.info("step=%d %s", step, text)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is stored in ``.hydra/config.yaml``."""


@contextmanager
def log_file(path: Path, *, hold: bool = False) -> Iterator[Callable[[], None]]:
    """Append the log messages of this package to a file while the context is active.

    Only rank 0 writes a file. The other ranks print warnings and errors.

    Args:
        path: The file. Its directory is created unless messages are held back.
        hold: Hold the messages back until the returned function is called. If it is not, there is no file.

    Returns:
        A function that writes the messages that have been held back, and all later ones as they come.
    """
    ours = logging.getLogger("rlhf")
    metrics_log.propagate = False
    if not is_rank_zero():
        ours.setLevel(logging.WARNING)
        yield lambda: None
        return
    if not hold:
        path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8", delay=hold)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler = MemoryHandler(sys.maxsize, flushLevel=sys.maxsize, target=file, flushOnClose=False)

    def release() -> None:
        handler.capacity = 1
        handler.flush()

    if not hold:
        release()
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    metrics_log.addHandler(handler)
    try:
        yield release
    finally:
        ours.removeHandler(handler)
        metrics_log.removeHandler(handler)
        handler.close()
        file.close()


class ReportHandler(logging.Handler):
    """Passes the messages in ``REPORTS``, and warnings, to the loggers of this package, and drops all others."""

    def emit(self, record: logging.LogRecord) -> None:
        ours = logging.getLogger("rlhf")
        is_report = record.levelno >= logging.WARNING or record.getMessage().startswith(REPORTS[record.name])
        if is_report and ours.isEnabledFor(record.levelno):
            ours.handle(record)


report_handler = ReportHandler()


def quiet_libraries() -> None:
    """Silence third-party banners, progress bars and warnings that do not concern users.

    The reports of Lightning's profilers and ``EarlyStopping``, and the message of a time limit, are kept.
    """
    import warnings

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # It shows how the weights of each model are loaded.
    for name in ("lightning.pytorch", "lightning.fabric", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in REPORTS:
        reports = logging.getLogger(name)
        reports.setLevel(logging.INFO)
        reports.propagate = False
        reports.addHandler(report_handler)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # It logs the errors that it raises.
    for pattern in (
        "Checkpoint directory .* exists and is not empty",
        "The `srun` command is available",
        "Found .* module.* in eval mode at the start of training",
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "Total length of `list` across ranks is zero",
        "You're resuming from a checkpoint that ended before the epoch ended",
    ):
        warnings.filterwarnings("ignore", message=f".*{pattern}.*")
