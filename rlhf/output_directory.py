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
from rlhf.files import LOCK, LOGGED, locked, remove, remove_if_empty
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
        self._existing: set[Path] = set()  # what earlier commands have left
        self._log_size = 0  # of the log that they have written, in bytes
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
            self._existing = set(self.path.rglob("*")) - (set() if existed else {self.path / LOCK})
            log_path = self.path / self.log_name
            self._log_size = log_path.stat().st_size if log_path.is_file() else 0
            has_bug = False
            try:
                with log_file(log_path, hold=True) as self._release_log:
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
                    self._remove_new_files()

    def start(self, *, replaces_configuration: bool = True) -> None:
        """Write the configuration and the log. The first call has an effect, on rank 0 only.

        Args:
            replaces_configuration: Whether ``.hydra/`` of an earlier command is replaced. False if its result stays.
        """
        if self.started:
            return
        self.started = True
        self._write_log()
        directory = self.path / ".hydra"
        if is_rank_zero() and (replaces_configuration or not directory.exists()):
            write_configuration(self.cfg, directory)

    def remove_earlier_logs(self) -> None:
        """Delete the metrics and messages that earlier commands have logged. Those of this command stay."""
        for name in LOGGED:
            for path in self._existing.intersection((self.path / name).glob("*")):
                remove(path)
        if self._log_size:
            with open(self.path / self.log_name, "r+b") as file:  # The log itself is open for appending.
                file.seek(self._log_size)
                content = file.read()
                file.seek(0)
                file.write(content)
                file.truncate()
            self._log_size = 0

    def _write_log(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._release_log()

    def _remove_new_files(self) -> None:
        locks = [path.parent for path in self.path.rglob(LOCK) if path.parent != self.path]  # of other commands
        for path in sorted(set(self.path.rglob("*")) - self._existing, reverse=True):  # Files before their directory.
            if not any(path.is_relative_to(other) or other.is_relative_to(path) for other in locks):
                remove(path)
        remove_if_empty(self.path, Path(self.cfg.paths.run))


class StartOutput(Callback):
    """Starts a directory when data and models have been accepted, just before training or evaluation starts.

    Args:
        directory: The directory. With ``trainer.fast_dev_run``, nothing is written to it.
        on_start: Function to call after the directory has been started.
    """

    def __init__(self, directory: OutputDirectory, on_start: Callable[[], None] | None = None) -> None:
        self.directory = directory
        self.on_start = on_start

    def start(self, *, replaces_configuration: bool = True) -> None:
        """Start the directory; see ``OutputDirectory.start``."""
        self.directory.start(replaces_configuration=replaces_configuration)
        if self.on_start is not None:
            self.on_start()

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.start(replaces_configuration=self.directory.cfg.check != "only")

    on_test_start = on_fit_start


def write_configuration(cfg: DictConfig, directory: Path) -> None:
    """Write the files that Hydra writes to ``.hydra/``: the configuration, Hydra's own, and the overrides."""
    directory.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, directory / "config.yaml")
    if HydraConfig.initialized():
        OmegaConf.save(OmegaConf.create({"hydra": HydraConfig.get()}), directory / "hydra.yaml")
        OmegaConf.save(HydraConfig.get().overrides.task, directory / "overrides.yaml")
