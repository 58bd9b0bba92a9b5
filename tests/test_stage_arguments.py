"""Constructors of stages check their arguments, and those of subclasses, by the signatures."""

from typing import Any

import lightning
import numpy as np
import pytest
import torch

from contract.configs import compose_config
from harness import TinyRun
from rlhf.config import check_values
from rlhf.errors import ConfigError
from rlhf.stage import StageModule


class TinyStage(StageModule):
    """A stage with a default for ``learning_rate``."""

    def __init__(self, **optimizer: Any) -> None:
        super().__init__(**{"learning_rate": 0.1, **optimizer})


class OwnArguments(TinyStage):
    """A subclass without ``**keys`` and with types that differ from those of its base class."""

    def __init__(self, rate="0.1", max_nonfinite_steps: "int | None" = None) -> None:
        super().__init__(learning_rate=float(rate), on_nonfinite="skip", max_nonfinite_steps=max_nonfinite_steps or 3)


class Outer(lightning.LightningModule):
    """Contains a stage, with arguments of the same name."""

    def __init__(self, learning_rate: str = "fast") -> None:
        super().__init__()
        self.inner = TinyStage(learning_rate=0.3)


@pytest.mark.parametrize("architecture", ["transformer"], indirect=True)
@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("sft", "warmup_ratio", 1.0),
        ("reward", "label_smoothing", 0.5),
        ("dpo", "beta", 0.0),
        ("dpo", "schedule", "step"),
        ("ppo", "ppo_epochs", 0),
        ("ppo", "clip_range", "wide"),
        ("grpo", "kl_coef", -1),
    ],
)
def test_modules_reject_an_argument_like_a_configuration(tiny_run: TinyRun, stage: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as configured:
        check_values(compose_config(f"stage={stage}", f"stage.{key}={value}"))
    with pytest.raises(ConfigError) as called:
        tiny_run.module(stage, **{key: value})
    assert str(called.value) == str(configured.value)


def test_modules_accept_scalars_of_numpy_and_torch() -> None:
    module = TinyStage(learning_rate=np.float32(0.5), weight_decay=torch.tensor(0.25), eps=1)
    assert (module.learning_rate, module.weight_decay, module.eps) == (0.5, 0.25, 1)
    with pytest.raises(ConfigError, match=r"^stage\.max_nonfinite_steps must be an integer of at least 1, got 0\."):
        TinyStage(max_nonfinite_steps=np.int64(0))


def test_each_class_declares_the_range_of_its_arguments() -> None:
    """A subclass may convert an argument before it passes it on; what the base class gets is checked as well."""
    module = OwnArguments("0.2")
    assert (module.learning_rate, module.nonfinite.max_steps) == (0.2, 3)
    assert {"rate": "0.2", "learning_rate": 0.2, "max_nonfinite_steps": None}.items() <= dict(module.hparams).items()
    with pytest.raises(ConfigError, match=r"^stage\.learning_rate must be a number above 0, got -1\.0\."):
        OwnArguments("-1")
    with pytest.raises(ConfigError, match=r"^stage\.max_nonfinite_steps must be an integer of at least 1, got -1\."):
        OwnArguments(max_nonfinite_steps=-1)


def test_arguments_of_an_enclosing_module_are_not_those_of_the_stage() -> None:
    assert Outer().inner.hparams["learning_rate"] == 0.3
