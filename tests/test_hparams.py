"""Hyperparameters and final metrics in TensorBoard's HPARAMS tab."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from contract.configs import compose_config
from harness import MetricsLogger
from rlhf.hparams import hyperparameters, log_hyperparameters


def test_settings_that_distinguish_runs_are_hyperparameters(tmp_path: Path) -> None:
    """Functions and classes by name, lists as text; no output directories, and nothing that is null."""
    found = hyperparameters(compose_config("stage=dpo", "loss=ipo", "seed=3", f"paths.root={tmp_path}"))
    assert found["seed"] == 3
    assert (found["stage"], found["stage.loss"], found["stage.beta"]) == ("DPOModule", "ipo_loss", 0.1)
    assert (found["stage.betas"], found["trainer.precision"]) == ("0.9, 0.999", "32-true")
    assert (found["model"], found["data.batch_size"]) == ("Transformer", 16)
    assert "stage.ref_logprobs_cache" not in found
    assert "stage.policy" not in found
    assert all(isinstance(value, str | int | float | bool) for value in found.values())


def test_tensorboard_shows_hyperparameters_with_final_metrics(tmp_path: Path) -> None:
    """Other loggers do not have this tab."""
    cfg = compose_config("stage=ppo", "stage.kl_coef=0.25", f"paths.root={tmp_path}")
    trainer: Any = SimpleNamespace(
        loggers=[TensorBoardLogger(tmp_path, name="tensorboard"), MetricsLogger()],
        callback_metrics={"val/score": torch.tensor(0.5), "train/token_accuracy": torch.tensor(0.1)},
        global_step=7,
    )
    log_hyperparameters(trainer, cfg, {"objective/kl": 2.0, "grad_norm": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "version_0")).Reload()
    names = {name for name in events.Tags()["scalars"] if name.startswith("final/")}
    assert names == {"final/val/score", "final/objective/kl"}
    assert [(event.step, event.value) for event in events.Scalars("final/objective/kl")] == [(7, 2.0)]
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    shown = HParamsPluginData.FromString(plugin.content).session_start_info.hparams
    assert shown["stage.kl_coef"].number_value == 0.25
    assert shown["stage.reward"].string_value == "ModelReward"
