"""A default exists once: the signature of a class agrees with the yaml that configures it."""

import inspect
from typing import Any

import pytest
from hydra.utils import get_object, instantiate

from contract.configs import STAGES, choices, compose_config, composed_dict, keywords, targets
from rlhf.reward_functions import ExactMatchReward
from rlhf.stages import commands, stages

# Settings objects for which a stage has other defaults than their class.
SET_BY_STAGE = ("kl", "scores")
# Every stage with its default choices, and every choice of the groups that configure a class or function.
# For the latter only the node of the choice is compared: a choice may also change keys of the stage.
GROUP_NODES = {
    "loss": "stage.loss",
    "advantage": "stage.advantage",
    "reward": "stage.reward",
    "sampler": "stage.sampler",
}


def compared_nodes() -> list[tuple[tuple[str, ...], str]]:
    """Return overrides and the path of a node to compare."""
    found = [((f"stage={stage}",), node) for stage in STAGES for node in ("stage", "data", "callbacks", "logger")]
    found += [(("stage=sft", f"model={name}"), "model") for name in choices("model")]
    found += [(("stage=sft", "adapter=lora"), "adapter")]
    found += [((f"stage={command}",), "command") for command in commands()]
    for group, node in GROUP_NODES.items():
        stage = next((info.name for info in stages().values() if group in info.groups), None)
        if stage is not None:
            found += [((f"stage={stage}", f"{group}={name}"), node) for name in choices(group)]
    return found


def select(node: dict[str, Any], path: str) -> dict[str, Any]:
    for key in path.split("."):
        node = node[key]
    return node


def comparable(value: Any) -> Any:
    """Bring yaml values and Python defaults to one form: an empty mapping, or one of nulls, is None."""
    if isinstance(value, dict):
        return {key: comparable(entry) for key, entry in value.items() if entry is not None} or None
    return [comparable(entry) for entry in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize(
    ("overrides", "path"), [pytest.param(*case, id=f"{' '.join(case[0])} {case[1]}") for case in compared_nodes()]
)
def test_signature_defaults_equal_the_yaml(overrides: tuple[str, ...], path: str) -> None:
    """Nodes of the data module are compared with ``data=jsonl``, since stages read batches of different sizes."""
    cfg = composed_dict(*overrides)
    jsonl = {**composed_dict("stage=sft", "data=jsonl")["data"], "train": None}
    root = (
        select(cfg, "stage.reward" if path == "stage.reward" else path) if path != "stage.reward" else reward_node(cfg)
    )
    differences = []
    for below, node in targets(root):
        if not node["_target_"].startswith("rlhf.") or (path == "stage" and below in SET_BY_STAGE):
            continue
        for name, parameter in keywords(get_object(node["_target_"])).items():
            if name not in node or not is_ours(get_object(node["_target_"]), name) or is_required(parameter):
                continue
            value = jsonl[name] if path == "data" and name in jsonl else node[name]
            if is_computed(value):
                continue
            if comparable(value) != comparable(parameter.default):
                key = ".".join(part for part in (path, below, name) if part)
                differences.append(f"{key}: {value!r} in the yaml, {parameter.default!r} in {node['_target_']}")
    assert differences == []


@pytest.mark.parametrize("name", SET_BY_STAGE)
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_settings_that_a_stage_sets_by_default_equal_the_yaml(stage: str, name: str) -> None:
    node = compose_config(f"stage={stage}").stage
    module = get_object(node._target_)(policy=None, reward=ExactMatchReward())
    settings, configured = getattr(module, name), instantiate(node[name])
    for keyword in keywords(type(configured)):
        assert getattr(settings, keyword) == getattr(configured, keyword), keyword


def is_ours(target: Any, name: str) -> bool:
    """Return True if a class or function of this project declares the keyword, and not a library's base class."""
    functions = [cls.__init__ for cls in target.__mro__] if inspect.isclass(target) else [target]
    ours = [function for function in functions if getattr(function, "__module__", "").startswith("rlhf.")]
    return any(name in inspect.signature(function).parameters for function in ours)


def is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def is_computed(value: Any) -> bool:
    """Return True for interpolations and missing values, and for nodes, which are compared by themselves."""
    if isinstance(value, dict):
        return "_target_" in value
    return isinstance(value, str) and (value.startswith("${") or value == "???")


def reward_node(cfg: dict[str, Any]) -> dict[str, Any]:
    """``stage.reward`` is an interpolation of the top-level node ``reward``."""
    node = cfg["stage"]["reward"]
    return cfg["reward"] if isinstance(node, str) else node
