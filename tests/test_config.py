"""Checks of configured values that need no model and no data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from contract.configs import STAGES, compose_config
from rlhf.config import check_choices, check_values, has_bfloat16, resolve_trainer
from rlhf.errors import ConfigError
from rlhf.schema import PositiveInt, check_arguments


class Inner:
    """A class whose keywords have one type each."""

    def __init__(
        self,
        count: int = 1,
        ratio: float = 0.5,
        limit: float | None = None,
        pair: tuple[float, float] = (0.0, 1.0),
        name: str = "",
        either: float | str = 1.0,
        anything: Any = None,
    ) -> None: ...


class Base:
    def __init__(self, rate: float = 0.1, mode: int = 1) -> None: ...


class Derived(Base):
    """Inherits ``rate`` through its keywords and declares ``mode`` with another type."""

    def __init__(self, mode: str = "fast", **keys: Any) -> None:
        super().__init__(**keys)


def loss(logprobs: Any, *, smoothing: float = 0.0) -> None: ...


def node(name: str, /, **settings: Any) -> dict[str, Any]:
    """Return the configuration of a class or function of this file."""
    return {"_target_": f"{__name__}.{name}", **settings}


def check(**nodes: Any) -> None:
    check_values(OmegaConf.create(nodes))


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_pass(stage: str) -> None:
    check_values(compose_config(f"stage={stage}"))


@pytest.mark.parametrize(
    ("key", "constraint", "valid"),
    [
        ("count", "an integer", "1"),
        ("ratio", "a number", "0.5"),
        ("limit", "a number or null", "<number>"),
        ("pair", "a list of 2 numbers", "[0.0,1.0]"),
    ],
)
def test_text_for_a_number_is_rejected(key: str, constraint: str, valid: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(stage=node("Inner", **{key: "fast"}))
    assert str(error.value) == f"stage.{key} must be {constraint}, got 'fast'.\n  Set stage.{key}={valid}."


@pytest.mark.parametrize(
    "settings",
    [
        {"count": 2, "ratio": 1, "limit": None, "pair": [0.1, 0.2]},
        {"name": "text", "either": "text", "anything": "text"},
        {"ratio": "${oc.env:HOME}", "count": "???"},  # An interpolation, and a value that is still missing.
    ],
)
def test_other_values_pass(settings: dict[str, Any]) -> None:
    assert check(stage=node("Inner", **settings), data={}, model={"path": "text"}) is None


@pytest.mark.parametrize("part", ["stage", "data", "model"])
def test_nodes_below_are_checked(part: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{part}\.sampling\.inner\.ratio must be a number, got 'wide'\."):
        check(**{part: {"sampling": {"inner": node("Inner", ratio="wide")}}})


def test_an_unknown_key_is_rejected() -> None:
    """A plus sign adds a key that no class has. A similar key is suggested."""
    for key, fix in {"ration": "Did you mean stage.ratio?", "unknown": "Remove stage.unknown."}.items():
        with pytest.raises(ConfigError) as error:
            check(stage=node("Inner", **{key: 1}))
        reason = f"because {__name__}.Inner has no keyword {key}"
        assert str(error.value) == f"stage.{key}: there is no such key, {reason}.\n  {fix}"


def test_a_target_that_cannot_be_imported_is_rejected() -> None:
    with pytest.raises(ConfigError) as error:
        check(stage={"_target_": "rlhf.nothing.Here"})
    assert str(error.value) == (
        "stage._target_ must be the import path of a class or function, got rlhf.nothing.Here: it cannot be imported."
        "\n  Name a class or function that can be imported."
    )


def test_other_parts_of_the_configuration_are_not_checked() -> None:
    """Lightning and the loggers check the types of their keywords."""
    assert check(trainer=node("Inner", ratio="wide")) is None


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("callbacks", "[{_target_: lightning.pytorch.callbacks.LearningRateMonitor}]", r"\[\{'_target_': .*\}\]"),
        ("callbacks", "null", "None"),
        ("logger", "false", "False"),
        ("logger", "{_target_: lightning.pytorch.loggers.CSVLogger, save_dir: x}", r"\{'_target_': .*\}"),
    ],
)
def test_callbacks_and_loggers_of_the_trainer_are_rejected(key: str, value: str, shown: str) -> None:
    """``build_trainer`` passes those that are configured under ``callbacks`` and ``logger`` instead."""
    message = (
        rf"^trainer\.{key}={shown} has no effect: the Trainer gets what is configured under {key}\."
        rf"\n  Add \+{key}\.<name>=\{{_target_: <class>\}}, or select none with {key}=\[\]\.$"
    )
    with pytest.raises(ConfigError, match=message):
        check_values(compose_config("stage=sft", f"+trainer.{key}={value}"))


def test_barebones_is_rejected() -> None:
    """Lightning would name its arguments, one after the other, which the stage sets itself."""
    with pytest.raises(
        ConfigError, match=r"^trainer\.barebones=True is not supported: .*\n  Set trainer\.barebones=false"
    ):
        check_values(compose_config("stage=sft", "trainer.barebones=true"))


def test_keywords_of_a_function_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"stage\.loss\.smoothing must be a number"):
        check(stage={"loss": {**node("loss", smoothing="much"), "_partial_": True}})


def test_inherited_keywords_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"stage\.rate must be a number, got 'fast'"):
        check(stage=node("Derived", rate="fast"))


def test_a_class_overrides_the_types_of_its_base() -> None:
    check(stage=node("Derived", mode="slow"))
    with pytest.raises(ConfigError, match=r"stage\.mode must be an integer, got 'slow'"):
        check(stage=node("Base", mode="slow"))


@pytest.mark.parametrize("choice", ["false", "true", "only"])
def test_check_has_three_choices(choice: str) -> None:
    check_choices(compose_config("stage=sft", f"check={choice}"))


@pytest.mark.parametrize("choice", ["onyl", "null"])
def test_another_choice_of_check_is_rejected(choice: str) -> None:
    with pytest.raises(ConfigError, match=r"^check must be false, true or only, got "):
        check_choices(compose_config("stage=sft", f"check={choice}"))


@pytest.mark.parametrize("key", ["overwrite", "pipeline.report", "pipeline.round.accumulate"])
@pytest.mark.parametrize("value", ["no", "abc", "null", "0"])
def test_text_for_true_or_false_is_rejected(key: str, value: str) -> None:
    """Text is true in Python: ``overwrite=no`` would delete the result of an earlier run."""
    with pytest.raises(ConfigError, match=rf"^{key} must be true or false, got .*\n  Set {key}=(true|false)\.$"):
        check_choices(compose_config(f"{key}={value}"))


def test_the_text_is_rejected_in_a_step_of_the_pipeline() -> None:
    with pytest.raises(ConfigError, match=r"^overwrite must be true or false, got 'no'\."):
        check_values(compose_config("stage=sft", "overwrite=no"))


# Arguments of calls in Python


class Unresolved:
    """A class whose annotations are text or missing."""

    def __init__(self, count: "PositiveInt" = 1, ratio=0.5, **keys: Any) -> None: ...


@pytest.mark.parametrize("settings", [{"count": "fast"}, {"limit": "fast"}, {"pair": [1.0]}, {"ratio": float("nan")}])
def test_arguments_are_rejected_like_a_configuration(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as configured:
        check(stage=node("Inner", **settings))
    with pytest.raises(ConfigError) as called:
        check_arguments(Inner, "stage", settings)
    assert str(called.value) == str(configured.value)


def test_arguments_without_a_node_are_rejected_by_their_name() -> None:
    with pytest.raises(ConfigError, match=r"^count must be an integer, got 1\.5\.\n  Set count=1\.$"):
        check_arguments(Inner, "", {"count": 1.5})


@pytest.mark.parametrize("count", [2, np.int64(2), torch.tensor(2)])
@pytest.mark.parametrize("ratio", [1, 1.0, np.float32(1), np.int64(1), torch.tensor(1.0)])
def test_scalars_of_numpy_and_torch_are_numbers(count: Any, ratio: Any) -> None:
    assert check_arguments(Inner, "stage", {"count": count, "ratio": ratio, "pair": (ratio, ratio)}) is None
    for settings in ({"count": np.float32(2)}, {"limit": torch.tensor(True)}):
        with pytest.raises(ConfigError, match="must be"):
            check_arguments(Inner, "stage", settings)


def test_a_path_is_text_and_other_names_are_ignored() -> None:
    assert check_arguments(Inner, "stage", {"name": Path("x"), "self": None, "keys": {"count": "fast"}}) is None


def test_annotations_that_are_text_or_missing_accept_everything() -> None:
    assert check_arguments(Unresolved, "stage", {"count": -1, "ratio": "wide", "other": 1}) is None


# trainer.precision=auto: bf16-mixed where the device has instructions for it


def resolved(accelerator: str, precision: str = "auto") -> str:
    cfg = OmegaConf.create({"trainer": {"accelerator": accelerator, "precision": precision}})
    resolve_trainer(cfg)
    return str(cfg.trainer.precision)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, "32-true"),
        ({"avx512_f": True}, "32-true"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True}, "bf16-mixed"),
    ],
)
def test_automatic_precision_on_a_cpu(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolved("cpu") == resolved("auto") == expected


@pytest.mark.parametrize("supported", [False, True])
def test_cuda_is_asked_before_the_cpu(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not supported})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert has_bfloat16("gpu") == has_bfloat16("auto") == supported
    assert has_bfloat16("cpu") != supported


def test_other_accelerators_use_float32() -> None:
    assert resolved("mps") == "32-true"


def test_mps_is_used_only_if_it_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for accelerator, expected in {"auto": "cpu", "mps": "mps", "cpu": "cpu"}.items():
        cfg = OmegaConf.create({"trainer": {"accelerator": accelerator, "precision": "32-true"}})
        resolve_trainer(cfg)
        assert cfg.trainer.accelerator == expected
    assert caplog.messages == [
        "trainer.accelerator=auto selects the CPU, because MPS has not been tested. To use it: trainer.accelerator=mps"
    ]


def test_an_explicit_precision_stays() -> None:
    assert resolved("cpu", "16-mixed") == "16-mixed"
    cfg = OmegaConf.create({"command": {}})
    resolve_trainer(cfg)
    assert cfg == {"command": {}}
