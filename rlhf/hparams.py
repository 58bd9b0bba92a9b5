"""The hyperparameters of a run and its final metrics."""

from collections.abc import Iterator, Mapping
from typing import Any

import lightning
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from rlhf.logs import TextLogger
from rlhf.overrides import leaves

# Metrics of the last logged step; those of validation are shown completely.
TRAINING_METRICS = ("train/loss", "objective/scores", "objective/kl", "response/length")
TRAINER_KEYS = (
    *("precision", "max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches", "gradient_clip_val"),
    *("devices", "num_nodes"),
)
DATA_KEYS = ("batch_size", "max_length", "max_rows", "template", "train")


def log_hyperparameters(trainer: lightning.Trainer, cfg: DictConfig, training_metrics: Mapping[str, Any]) -> None:
    """Write the hyperparameters of a run and its final metrics, as ``final/<name>``, to the loggers.

    TensorBoard shows them together in its HPARAMS tab.

    Args:
        trainer: The Trainer, after training.
        cfg: The configuration of the stage.
        training_metrics: The training metrics logged most recently.
    """
    shown = {name: training_metrics[name] for name in TRAINING_METRICS if name in training_metrics}
    shown |= {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    final = {f"final/{name}": float(value) for name, value in shown.items()}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(hyperparameters(cfg), final, step=trainer.global_step)
            logger.save()
        elif not isinstance(logger, TextLogger):
            logger.log_hyperparams(hyperparameters(cfg))
            logger.log_metrics(final, step=trainer.global_step)
            logger.save()


def hyperparameters(cfg: DictConfig) -> dict[str, str | int | float | bool]:
    """Return the settings that distinguish runs by their full names. Output directories and null are left out."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    nodes = {
        "seed": settings["seed"],
        **{name: settings.get(name) for name in ("stage", "model", "adapter")},
        "data": {key: settings["data"].get(key) for key in DATA_KEYS},
        "trainer": {key: settings["trainer"].get(key) for key in TRAINER_KEYS},
    }
    return {
        name: value
        for name, value in _shown(nodes)
        if not (isinstance(value, str) and value.startswith(f"{cfg.paths.root}/"))
    }


def _shown(nodes: dict[str, Any]) -> Iterator[tuple[str, str | int | float | bool]]:
    """Yield settings by their full names. A ``_target_`` is the value of its node, without the module's path."""
    for name, value in leaves(nodes):
        node, _, key = name.rpartition(".")
        if key == "_target_":
            yield node, str(value).rpartition(".")[2]
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value))
        elif value is not None and not key.startswith("_"):
            yield name, value
