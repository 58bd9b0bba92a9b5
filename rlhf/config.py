"""Checks of configured values that need no model and no data, and the values of ``auto`` in ``trainer``."""

import difflib
import logging
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from inspect import Parameter
from pydoc import ErrorDuringImport, locate
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf

from rlhf.errors import ConfigError
from rlhf.schema import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    accepts,
    declared_keywords,
    out_of_range,
)

log = logging.getLogger(__name__)

CHECK_CHOICES = (False, True, "only")
SAVE_HF_CHOICES = (False, True, "merged")
RESUME_CHOICES = (False, True, "force")
NODES = ("stage", "data", "model", "adapter", "reward", "callbacks", "trainer", "logger", "speed")
KEYS_ONLY = ("trainer", "logger")  # Lightning checks the types of their values.
SEED = 1  # an example of a valid value
# Keys that no class declares, with examples of valid values.
TOP_LEVEL = {
    "overwrite": (bool, False),
    "pipeline.report": (bool, True),
    "pipeline.rounds": (NonNegativeInt, 0),
    "pipeline.round.accumulate": (bool, False),
}
# Nodes and paths that cannot be null. Hydra rejects null for a configuration group.
REQUIRED = (
    *("speed", "paths.root", "paths.run"),
    *("pipeline", "pipeline.steps", "pipeline.variants", "pipeline.overrides"),
    *("pipeline.round", "pipeline.round.steps"),
)
# Flags of the Trainer that Lightning does not check, with examples of valid values.
LIMIT = PositiveInt | Annotated[float, "> 0", "<= 1"] | None
TRAINER = {
    "max_epochs": (PositiveInt | Literal[-1] | None, 1),
    "min_epochs": (NonNegativeInt | None, 1),
    "max_steps": (PositiveInt | Literal[-1], -1),
    "min_steps": (NonNegativeInt | None, 100),
    "limit_train_batches": (LIMIT, 100),
    "limit_val_batches": (NonNegativeInt | Annotated[float, ">= 0", "<= 1"] | None, 1.0),
    "limit_test_batches": (LIMIT, 1.0),
    "val_check_interval": (LIMIT | Annotated[str, "a time as DD:HH:MM:SS"], 1.0),
    "check_val_every_n_epoch": (PositiveInt | None, 1),
    "num_sanity_val_steps": (NonNegativeInt | Literal[-1] | None, 0),
    "log_every_n_steps": (PositiveInt | None, 1),
    "accumulate_grad_batches": (PositiveInt, 1),
    "gradient_clip_val": (NonNegativeFloat | None, 1.0),
    "gradient_clip_algorithm": (Literal["norm", "value"] | None, "norm"),
    "num_nodes": (PositiveInt, 1),
    "reload_dataloaders_every_n_epochs": (NonNegativeInt, 0),
}
SIMILAR = 0.6  # smallest similarity of a key that is suggested instead of an unknown one


def check_values(cfg: DictConfig, nodes: Sequence[str] = NODES) -> None:
    """Reject unknown keys, and values outside of the range that the signature of the configured class declares.

    No weight is loaded and nothing is written before this check. Interpolations are checked at the key they refer to.

    Raises:
        ConfigError: A class or function has no such keyword, or does not accept the value.
    """
    content = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(content, dict)
    _check_value("seed", content.get("seed", SEED), Seed, SEED)
    _check_top_level(cfg)
    trainer = (content.get("trainer") or {}) if "trainer" in nodes else {}
    for key, (annotation, example) in TRAINER.items():
        _check_value(f"trainer.{key}", trainer.get(key, example), annotation, example)
    _check_flags(trainer)
    for name in nodes:
        _check_node(content.get(name), name, keys_only=name in KEYS_ONLY)


def _check_flags(trainer: dict[str, Any]) -> None:
    """Reject flags of the Trainer that contradict what ``build_trainer`` passes to it."""
    for key in ("callbacks", "logger"):
        if key in trainer:
            raise ConfigError(
                f"trainer.{key}={trainer[key]} has no effect: the Trainer gets what is configured under {key}.",
                f"Add +{key}.<name>={{_target_: <class>}}, or select none with {key}=[].",
            )
    if trainer.get("barebones") not in (None, False):
        raise ConfigError(
            f"trainer.barebones={trainer['barebones']} is not supported: it excludes the logging, the checkpoints and "
            "the callbacks of a stage.",
            "Set trainer.barebones=false, with callbacks=[] logger=[] trainer.enable_progress_bar=false for a run "
            "without most of them.",
        )


def check_choices(cfg: DictConfig) -> None:
    """Reject unknown values of the keys that no class declares, such as ``check``, ``resume`` and ``save_hf``."""
    _check_top_level(cfg)
    if cfg.resume not in RESUME_CHOICES:
        raise ConfigError(f"resume must be false, true or force, got {cfg.resume}.", "Set resume=true.")
    if cfg.check not in CHECK_CHOICES:
        raise ConfigError(f"check must be false, true or only, got {cfg.check}.", "Set check=true.")
    if cfg.save_hf not in SAVE_HF_CHOICES:
        raise ConfigError(f"save_hf must be false, true or merged, got {cfg.save_hf}.", "Set save_hf=true.")
    if cfg.save_hf == "merged" and cfg.adapter is None and cfg.stage_name != "pipeline":
        raise ConfigError("save_hf=merged has no effect with adapter=none.", "Set save_hf=true.")


def _check_top_level(cfg: DictConfig) -> None:
    for key in REQUIRED:
        if OmegaConf.select(cfg, key, default="") is None:
            raise ConfigError(f"{key} must not be null.", "Leave it out, or give it a value.")
    for key, (annotation, example) in TOP_LEVEL.items():
        _check_value(key, OmegaConf.select(cfg, key, default=example), annotation, example)


def _check_node(node: Any, path: str, *, keys_only: bool) -> None:
    """Check every node with a ``_target_``, this one and those below it, in the unresolved configuration."""
    for inner, settings in _targets(node, path):
        keywords, is_open = declared_keywords(_target(inner, settings))
        _check_keys(inner, settings, keywords, is_open)
        for key, value in settings.items():
            if key in keywords and not keys_only:
                parameter = keywords[key]
                example = None if parameter.default is Parameter.empty else parameter.default
                _check_value(f"{inner}.{key}", value, parameter.annotation, example)


def _targets(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and content of every node with a ``_target_``."""
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        yield path, node
    for key, value in node.items():
        yield from _targets(value, f"{path}.{key}")


def _target(path: str, node: dict[str, Any]) -> Any:
    """Return the class or function that a node configures."""
    try:
        found = locate(str(node["_target_"]))
        reason = "it cannot be imported"
    except ErrorDuringImport as error:
        found, reason = None, str(error.value)
    if not callable(found):
        raise ConfigError(
            f"{path}._target_ must be the import path of a class or function, got {node['_target_']}: {reason}.",
            "Name a class or function that can be imported.",
        )
    return found


def _check_keys(path: str, node: dict[str, Any], keywords: dict[str, Parameter], is_open: bool) -> None:
    """Reject a key that the configured class or function does not have."""
    for key in node:
        if key in keywords or is_open or key.startswith("_"):
            continue
        similar = difflib.get_close_matches(key, keywords, n=1, cutoff=SIMILAR)
        raise ConfigError(
            f"{path}.{key}: there is no such key, because {node['_target_']} has no keyword {key}.",
            f"Did you mean {path}.{similar[0]}?" if similar else f"Remove {path}.{key}.",
        )


def _check_value(key: str, value: Any, annotation: Any, example: Any) -> None:
    """Reject a value that an annotation does not allow. Interpolations and missing values are not checked here."""
    if value == "???" or (isinstance(value, str) and value.startswith("${")):
        return
    items = value if isinstance(value, list) else []
    if any(isinstance(item, str) and item.startswith("${") for item in items) or accepts(annotation, value):
        return
    raise out_of_range(key, value, annotation, example)


def resolve_trainer(cfg: DictConfig) -> None:
    """Replace ``auto`` in the configuration of the Trainer, if there is one.

    ``trainer.accelerator=auto`` becomes the CPU where Lightning would choose MPS, the GPU of Apple's processors, which
    has not been tested. ``trainer.precision=auto`` becomes the precision in which the device is fast. Outputs record
    it, so a run that is resumed on another kind of device reports the change.
    """
    if "trainer" not in cfg:
        return
    if cfg.trainer.accelerator == "auto" and _has_only_mps():
        _warn_of_mps()
        cfg.trainer.accelerator = "cpu"
    if cfg.trainer.precision == "auto":
        cfg.trainer.precision = "bf16-mixed" if has_bfloat16(cfg.trainer.accelerator) else "32-true"


def _has_only_mps() -> bool:
    if sys.platform != "darwin":
        return False
    import torch  # imported here, as in ``has_bfloat16``

    return torch.backends.mps.is_available()


@cache
def _warn_of_mps() -> None:
    """Warn once per process."""
    log.warning(
        "trainer.accelerator=auto selects the CPU, because MPS has not been tested. To use it: trainer.accelerator=mps"
    )


def has_bfloat16(accelerator: str) -> bool:
    """Return whether a device has instructions for matrix products in bfloat16.

    Args:
        accelerator: Accelerator of the Trainer. ``auto`` is a CUDA device if there is one, and the CPU otherwise.
    """
    import torch  # imported here, because commands that are rejected should not load it

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if accelerator not in ("auto", "cpu"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
