"""The stages of the pipeline, as ``conf/stage/*.yaml`` declare them.

This is the only list of stages: output files, inputs, order, demo files, help texts and tests follow from it. It can be
read without importing torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

CONF = Path(__file__).parents[1] / "conf"
BASE_MODEL = "model"  # an input that is the base model of the configuration group ``model``


@dataclass(frozen=True)
class StageInfo:
    """What a stage declares under ``stage_info`` in its yaml.

    Args:
        name: Name of the stage and of its yaml.
        exports: ``policy``, ``reward_model``, or None for a stage that exports no model.
        final: File that the stage writes to ``outputs/<run>/<name>/``; None if it exports no model.
        reads: Key of ``files`` in ``conf/data/demo.yaml``: which bundled files the stage reads.
        inputs: Keyword of the stage's module -> the stage that makes it, or ``model`` for the base model.
        position: Order in listings.
        rl_priority: The stage with the lowest priority in a run makes ``final_rl_model.pt``; None: never.
        groups: Configuration groups that the stage's defaults list includes, such as ``loss``.
    """

    name: str
    exports: str | None
    final: str | None
    reads: str
    inputs: Mapping[str, str]
    position: int
    rl_priority: int | None
    groups: tuple[str, ...] = ()


@cache
def stages() -> dict[str, StageInfo]:
    """Return every declared stage by name, in the order of their positions."""
    found = [info for path in sorted((CONF / "stage").glob("*.yaml")) if (info := _read(path)) is not None]
    return {info.name: info for info in sorted(found, key=lambda info: info.position)}


@cache
def commands() -> list[str]:
    """Return the names of the commands: choices of ``stage`` that neither train nor evaluate, such as ``doctor``."""
    return [path.stem for path in sorted((CONF / "stage").glob("*.yaml")) if "command" in OmegaConf.load(path)]


def policy_stages() -> list[StageInfo]:
    """Return the stages that export a policy, in order."""
    return [info for info in stages().values() if info.exports == "policy"]


def stages_with_group(group: str) -> list[str]:
    """Return the names of the stages that have a configuration group, such as ``loss``."""
    return [info.name for info in stages().values() if group in info.groups]


def _read(path: Path) -> StageInfo | None:
    """Read the declaration of one stage; None for a yaml without one: the pipeline's or a command's."""
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    if "stage_info" not in config:
        return None
    declared = OmegaConf.to_container(config.stage_info)
    assert isinstance(declared, dict)
    return StageInfo(name=path.stem, groups=_groups(config), **{str(key): value for key, value in declared.items()})


def _groups(config: DictConfig, depth: int = 0) -> tuple[str, ...]:
    """Return the groups in a defaults list, those of included yaml files among them."""
    found: list[str] = []
    for entry in config.get("defaults", []):
        if isinstance(entry, str):
            continue
        for group, choice in entry.items():
            name = str(group).lstrip("/").split("@")[0]
            found.append(name)
            included = CONF / name / f"{choice}.yaml"
            if included.is_file() and depth < 3:
                inner = OmegaConf.load(included)
                found += _groups(inner, depth + 1) if isinstance(inner, DictConfig) else ()
    return tuple(found)
