"""``logger=``: which loggers a run has, and what each of them receives."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure

from contract.configs import compose_config
from harness import TINY_DATA, TINY_MODEL, run_train
from rlhf.errors import ConfigError
from rlhf.logs import TextLogger
from rlhf.run import build_logger
from rlhf.stage.loggers import log_figure, log_table

HEADER, ROWS = ("prompt", "score"), [("It rains.", 0.123456), ("a\nb", -2.0)]


@pytest.fixture(scope="session")
def architecture() -> str:
    return "transformer"


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ((), {"text", "tensorboard"}),
        (("logger=csv",), {"text", "csv"}),
        (("logger=[tensorboard,csv]",), {"text", "tensorboard", "csv"}),
        (("logger=[wandb,mlflow]",), {"text", "wandb", "mlflow"}),
    ],
)
def test_loggers_are_chosen_by_name(override: tuple[str, ...], names: set[str]) -> None:
    """One or several. The text log is always there; ``logger.text=null`` removes it."""
    cfg = compose_config("stage=sft", *override)
    assert set(cfg.logger) == names
    assert compose_config("stage=sft", *override, "logger.text=null").logger.text is None


def test_a_missing_package_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    cfg = compose_config("stage=sft", "logger=wandb", f"paths.root={tmp_path}")
    with pytest.raises(ConfigError, match=r"^logger\.wandb needs a package .*\n  Install it \(pip install wandb\)"):
        build_logger("wandb", cfg.logger.wandb)


def plot() -> Figure:
    figure = Figure()
    figure.subplots().plot([0, 1])
    return figure


def test_csv_has_samples_and_figures_as_files(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv", version="")
    for step in (1, 2):
        log_table([logger], HEADER, ROWS, name="samples", step=step)
    log_figure([logger], "report", plot, step=2)
    rows = [json.loads(line) for line in (tmp_path / "csv" / "samples.jsonl").open(newline="\n")]
    assert rows[:2] == [
        {"step": 1, "prompt": "It rains.", "score": 0.123456},
        {"step": 1, "prompt": "a\nb", "score": -2.0},
    ]
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    assert (tmp_path / "csv" / "report.png").read_bytes().startswith(b"\x89PNG")


class Calls:
    """Records the calls of any method."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


class FakeWandb(WandbLogger):
    """Lightning's logger with another client."""

    def __init__(self) -> None:
        self.client, self.tables = Calls(), []

    @property
    def experiment(self) -> Any:
        return self.client

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        self.tables.append((args, kwargs))


class FakeMLFlow(MLFlowLogger):
    """Lightning's logger with another client."""

    def __init__(self) -> None:
        self.client = Calls()

    experiment: Any = property(lambda self: self.client)
    run_id: Any = property(lambda self: "run")


def test_wandb_has_tables_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("wandb")
    module.Image = lambda figure: ("image", type(figure).__name__)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    logger = FakeWandb()
    log_table([logger], HEADER, ROWS, name="samples", step=3)
    log_figure([logger], "report", plot, step=3)
    data = [["It rains.", 0.123456], ["a\nb", -2.0]]
    assert logger.tables == [(("samples",), {"columns": ["prompt", "score"], "data": data, "step": 3})]
    assert logger.client.calls == [("log", ({"report": ("image", "Figure"), "trainer/global_step": 3},), {})]


def test_mlflow_has_artifacts() -> None:
    logger = FakeMLFlow()
    log_table([logger], HEADER, ROWS, name="samples", step=3)
    log_figure([logger], "report", plot, step=3)
    (text, text_args, _), (figure, figure_args, _) = logger.client.calls
    assert (text, text_args[0], text_args[2]) == ("log_text", "run", "samples/step3.txt")
    assert "1.  prompt  It rains." in text_args[1]
    assert (figure, figure_args[0], figure_args[2]) == ("log_figure", "run", "report/step3.png")


def test_loggers_without_tables_are_left_out(tmp_path: Path) -> None:
    """The text log has no figures."""
    log_figure([TextLogger()], "report", lambda: pytest.fail("drawn for nobody"), step=1)
    logger = TensorBoardLogger(tmp_path, name="tensorboard")
    log_figure([logger], "report", plot, step=1)
    logger.finalize("success")
    assert list((tmp_path / "tensorboard").rglob("events*"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package"), [("csv", "csv"), ("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_stage_runs_with_every_logger(
    repo: Path, tmp_path: Path, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without network: Weights & Biases is offline, and MLflow uses a local database."""
    pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = ["stage=sft", *TINY_MODEL["transformer"], *TINY_DATA, "trainer.max_steps=2", "data.batch_size=8"]
    run_train(repo, tmp_path, *command, f"logger={name}", "stage.samples=2", "trainer.log_every_n_steps=1")
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    expected = {"csv": "metrics.csv", "wandb": "wandb-summary.json", "mlflow": "mlflow.db"}[name]
    if name == "wandb":
        assert any(entry.startswith("run-") and entry.endswith(".wandb") for entry in written)
    else:
        assert expected in written
    if name == "csv":
        assert {"samples.jsonl", "hparams.yaml"} <= written
