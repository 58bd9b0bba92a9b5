"""Checks of configured values that need no model and no data."""

from collections.abc import Sequence
from inspect import signature
from typing import Any, get_args

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from rlhf.errors import ConfigError

CHECK_CHOICES = (False, True, "only")
SAVE_HF_CHOICES = (False, True, "merged")
RESUME_CHOICES = (False, True, "force")


def check_values(cfg: DictConfig, nodes: Sequence[str] = ("stage", "data", "model", "adapter")) -> None:
    """Reject values of a wrong type in some nodes of the configuration before any weight is loaded.

    Raises:
        ConfigError: A class or function expects a number, and the configuration contains text.
    """
    for name in nodes:
        if cfg.get(name) is not None:
            _check_numbers(OmegaConf.to_container(cfg[name], resolve=False), name)


def check_choices(cfg: DictConfig) -> None:
    """Reject unknown values of the top-level keys ``check``, ``resume`` and ``save_hf``."""
    if cfg.resume not in RESUME_CHOICES:
        raise ConfigError(f"resume must be false, true or force, got {cfg.resume}.", "Set resume=true.")
    if cfg.check not in CHECK_CHOICES:
        raise ConfigError(f"check must be false, true or only, got {cfg.check}.", "Set check=true.")
    if cfg.save_hf not in SAVE_HF_CHOICES:
        raise ConfigError(f"save_hf must be false, true or merged, got {cfg.save_hf}.", "Set save_hf=true.")
    if cfg.save_hf == "merged" and cfg.adapter is None and cfg.stage_name != "pipeline":
        raise ConfigError("save_hf=merged has no effect with adapter=none.", "Set save_hf=true.")


def _check_numbers(node: Any, path: str) -> None:
    """Check one node of the unresolved configuration and the nodes below it."""
    if not isinstance(node, dict):
        return
    expected = _expected_types(node["_target_"]) if "_target_" in node else {}
    for key, value in node.items():
        types = expected.get(key, ())
        is_number = (int in types or float in types) and str not in types
        if is_number and isinstance(value, str) and value != "???" and not value.startswith("${"):
            raise ConfigError(f"{path}.{key} must be a number, got '{value}'.", f"Set {path}.{key}=<number>")
        _check_numbers(value, f"{path}.{key}")


def _expected_types(target: str) -> dict[str, tuple[Any, ...]]:
    """Return the annotated types of each keyword of a class, including its base classes, or of a function."""
    found = get_object(target)
    classes = reversed(found.__mro__) if isinstance(found, type) else ()  # A subclass overrides what its base declares.
    functions = [vars(base)["__init__"] for base in classes if "__init__" in vars(base)] or [found]
    return {
        parameter.name: get_args(parameter.annotation) or (parameter.annotation,)
        for function in functions
        for parameter in signature(function).parameters.values()
    }
