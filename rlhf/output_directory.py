"""The directory of a stage or a pipeline. A command that is rejected before training starts leaves nothing in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from rlhf.distributed import is_rank_zero
from rlhf.errors import explain
from rlhf.files import LOCK, locked, remove, remove_if_empty
from rlhf.logs import log_file


class OutputDirectory:
    """A directory that a command writes to only once it has been accepted.

    Configuration, data and models may be rejected until ``start`` is called. Log messages are held back until then. If
    the command is rejected, or never starts, the files that it has created are deleted.

    Args:
        cfg: The configuration, which ``start`` writes to ``.hydra/``.
        path: The directory.
        log_name: Name of the log file in it.
    """

    def __init__(self, cfg: DictConfig, path: Path, log_name: str) -> None:
        self.cfg = cfg
        self.path = path
        self.log_name = log_name
        self.started = False
        self._release_log: Callable[[], None] = lambda: None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the lock of this directory, and write its log, during the context.

        Raises:
            ConfigError: Another process holds the lock. Its files stay as they are.
        """
        if not is_rank_zero():
            with log_file(self.path / self.log_name):
                yield
            return
        existed = (self.path / LOCK).exists()
        with locked(self.path):
            existing = set(self.path.rglob("*")) - (set() if existed else {self.path / LOCK})
            has_bug = False
            try:
                with log_file(self.path / self.log_name, hold=True) as self._release_log:
                    try:
                        yield
                    except Exception as error:
                        has_bug = not explain(error)
                        if has_bug and not self.started:
                            with suppress(OSError):
                                self._write_log()  # It helps to find the bug.
                        raise
            finally:
                if not self.started and not has_bug:
                    self._remove_all_but(existing)

    def start(self) -> None:
        """Write the configuration and the log. The first call has an effect, on rank 0 only."""
        if self.started:
            return
        self.started = True
        self._write_log()
        if is_rank_zero():
            write_configuration(self.cfg, self.path / ".hydra")

    def _write_log(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._release_log()

    def _remove_all_but(self, existing: set[Path]) -> None:
        for path in sorted(set(self.path.rglob("*")) - existing, reverse=True):  # Files before their directory.
            remove(path)
        remove_if_empty(self.path, Path(self.cfg.paths.run))


class StartOutput(Callback):
    """Calls functions when data and models have been accepted, just before training or evaluation starts.

    Args:
        functions: What to call. With ``trainer.fast_dev_run``, nothing is written, and they are not called.
    """

    def __init__(self, *functions: Callable[[], None]) -> None:
        self.functions = functions

    def start(self) -> None:
        """Call the functions."""
        for function in self.functions:
            function()

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.start()

    on_test_start = on_fit_start


def write_configuration(cfg: DictConfig, directory: Path) -> None:
    """Write the files that Hydra writes to ``.hydra/``: the configuration, Hydra's own, and the overrides."""
    directory.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, directory / "config.yaml")
    if HydraConfig.initialized():
        OmegaConf.save(OmegaConf.create({"hydra": HydraConfig.get()}), directory / "hydra.yaml")
        OmegaConf.save(HydraConfig.get().overrides.task, directory / "overrides.yaml")
