"""Composed configurations and the signatures behind them, for the tests that read ``conf/``."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict

from rlhf.stages import stages

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
STAGES = tuple(stages())
YAML_FILES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))
# Values that a choice cannot be composed without.
REQUIRED_OVERRIDES = {
    "data=jsonl": ["data.train=x.jsonl"],
    "data=hub": ["data.train=owner/name"],
    "model=pretrained": ["model.path=x"],
}
# Groups that hold settings shared by several stages instead of choices.
SHARED_BASES = {"rl"}
HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_"}
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def compose_config(*overrides: str) -> DictConfig:
    """Compose the configuration of ``train.py`` with overrides, plus what a data or model choice requires.

    Composing takes 0.1 s, so equal overrides get copies of one configuration. The directory of the outputs, which
    differs from test to test, is set in the copy.
    """
    roots = [override for override in overrides if re.fullmatch(r"paths\.root=[\w./-]+", override)]
    cfg = deepcopy(_composed(*(override for override in overrides if override not in roots)))
    for root in roots:
        cfg.paths.root = root.split("=")[1]
    return cfg


@cache
def _composed(*overrides: str) -> DictConfig:
    required = [extra for choice in overrides for extra in REQUIRED_OVERRIDES.get(choice, [])]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*required, *overrides])


@contextmanager
def hydra_command(*overrides: str, conf: Path = CONF) -> Iterator[DictConfig]:
    """Compose a configuration as ``python train.py`` with overrides does, and keep Hydra's state during the context."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        try:
            yield cfg
        finally:
            HydraConfig.instance().cfg = None


def to_dict(cfg: DictConfig) -> dict[str, Any]:
    """Convert a configuration to dictionaries and lists, without resolving interpolations."""
    return OmegaConf.to_container(cfg, resolve=False)


@cache
def composed_dict(*overrides: str) -> dict[str, Any]:
    """Return ``to_dict(compose_config(...))``, cached. Do not modify the result."""
    return to_dict(compose_config(*overrides))


def choices(group: str) -> list[str]:
    """Return the names of the yaml files of a configuration group."""
    return [name.split("/")[1] for name in YAML_FILES if name.startswith(f"{group}/")]


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the path and content of every node with a ``_target_``."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}".lstrip("."))


def leaf_keys(node: dict[str, Any], prefix: str = "") -> set[str]:
    """Return the dotted keys of all values that are not dictionaries; empty dictionaries count as values."""
    found: set[str] = set()
    for key, value in node.items():
        if key in HYDRA_KEYS:
            continue
        path = f"{prefix}{key}"
        found |= leaf_keys(value, f"{path}.") if isinstance(value, dict) and value else {path}
    return found


def keywords(function: Any) -> dict[str, inspect.Parameter]:
    """Return every keyword that a class or function takes; ``**kwargs`` stands for those of the base class."""
    if not inspect.isclass(function):
        parameters = dict(inspect.signature(function).parameters)
        return {name: p for name, p in parameters.items() if p.kind not in VARIADIC}
    found: dict[str, inspect.Parameter] = {}
    for cls in function.__mro__:
        if "__init__" not in vars(cls):
            continue
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        for parameter in own:
            found.setdefault(parameter.name, parameter)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own):
            break
    return {name: parameter for name, parameter in found.items() if parameter.kind not in VARIADIC}


def required_keywords(target: str) -> set[str]:
    """Return the keywords without a default; of a library's class only its own, since it may fill in inherited ones."""
    function = get_object(target)
    own = keywords(function) if target.startswith("rlhf.") else inspect.signature(function).parameters
    return {name for name, p in own.items() if p.default is p.empty and p.kind not in VARIADIC}


def paired_choices(*groups: str) -> list[tuple[str, ...]]:
    """Return overrides that make one choice of every group at a time, until each choice has been made."""
    rows = zip_longest(*([f"{group}={name}" for name in choices(group)] for group in groups))
    return [tuple(filter(None, row)) for row in rows]


def combinations() -> list[tuple[str, ...]]:
    """Return overrides that together choose every yaml: each stage with each model and data, and every other choice."""
    crossed = [(f"stage={stage}", *pair) for stage in choices("stage") for pair in paired_choices("model", "data")]
    every_stage = [
        ("stage=sft", f"{group}={name}") for group in ("logger", "callbacks", "adapter") for name in choices(group)
    ]
    every_stage += [(f"stage={stage}", f"trainer={name}") for stage in ("sft", "ppo") for name in choices("trainer")]
    some_stages = [
        (f"stage={info.name}", f"{group}={name}")
        for info in stages().values()
        for group in info.groups
        for name in choices(group)
        if group not in SHARED_BASES
    ]
    deltas = [(f"{group}={name}",) for group in ("experiment", "sweep") for name in choices(group)]
    return [*crossed, *every_stage, *some_stages, *deltas]
