"""The plain-text log of a stage: messages and metrics in one file, one line a step."""

import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

lines = logging.getLogger("rlhf.metrics")


class TextLogger(Logger):
    """A Lightning logger that writes each step's numbers as one line of ``<stage>.log``."""

    @property
    def name(self) -> str:
        return "text"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        numbers = (f"{name}={value:.6g}" for name, value in sorted(metrics.items()) if name != "epoch")
        lines.info("step=%s %s", step, " ".join(numbers))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration stands in ``.hydra/config.yaml``."""


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """While this is open, what the project logs is also written to a file; it grows, so nothing is lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger("rlhf")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    lines.addHandler(handler)
    lines.propagate = False  # numbers go to the file, not to the terminal
    try:
        yield
    finally:
        ours.removeHandler(handler)
        lines.removeHandler(handler)
        handler.close()


def quiet_libraries() -> None:
    """Keep Lightning's greetings and the warnings that do not concern a user of this project off the terminal."""
    import warnings

    for name in ("lightning.pytorch", "lightning.fabric", "datasets", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        "Checkpoint directory .* exists and is not empty",
        "The `srun` command is available",
        "Found .* module.* in eval mode at the start of training",
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "Total length of `list` across ranks is zero",
        "You're resuming from a checkpoint that ended before the epoch ended",
    ):
        warnings.filterwarnings("ignore", message=f".*{pattern}.*")
