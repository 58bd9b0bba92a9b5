"""Tables and figures in the loggers that can show them."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from rlhf.logs import TextLogger
from rlhf.stage.sample_table import markdown_table, text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_table(
    loggers: Iterable[Logger],
    header: Sequence[str],
    rows: Sequence[Sequence[str | float]],
    *,
    name: str,
    step: int,
) -> None:
    """Write a table to each logger that can show it.

    These are TensorBoard's text tab, ``<stage>.log``, tables of Weights & Biases, artifacts of MLflow, and
    ``<name>.jsonl`` next to the ``metrics.csv`` of ``CSVLogger``. Other loggers are left out.

    Args:
        loggers: The loggers of the Trainer.
        header: Names of the columns.
        rows: Cells of each row: text, or numbers, which are shown with four digits.
        name: Name of the table.
        step: The optimizer step.
    """
    cells = [[cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row] for row in rows]
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown_table(header, cells), step)
        elif isinstance(logger, TextLogger):
            logger.log_text(f"{name}\n{text_table(header, cells)}", step)
        elif isinstance(logger, WandbLogger):
            logger.log_table(name, columns=list(header), data=[list(row) for row in rows], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text_table(header, cells), f"{name}/step{step}.txt")
        elif isinstance(logger, CSVLogger):
            _append_rows(Path(logger.log_dir) / f"{name}.jsonl", header, rows, step)


def log_figure(loggers: Iterable[Logger], name: str, plot: Callable[[], "Figure"], *, step: int) -> None:
    """Write a figure to each logger that can show it: TensorBoard, Weights & Biases, MLflow, and a PNG file for CSV.

    Args:
        loggers: The loggers of the Trainer.
        name: Name of the figure.
        plot: Draws the figure. It is called once for each logger, because a logger may close the figure.
        step: The optimizer step.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, plot(), step)
        elif isinstance(logger, WandbLogger):
            import wandb

            logger.experiment.log({name: wandb.Image(plot()), "trainer/global_step": step})
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, plot(), f"{name}/step{step}.png")
        elif isinstance(logger, CSVLogger):
            path = Path(logger.log_dir) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            plot().savefig(path)


def _append_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for row in rows:
            content = {"step": step, **dict(zip(header, row, strict=True))}
            file.write(json.dumps(content, ensure_ascii=False) + "\n")
