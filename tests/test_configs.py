"""Every yaml in conf/: it composes, and every key is a keyword of the class that its ``_target_`` names."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class, get_object
from omegaconf import DictConfig, OmegaConf

CONF = Path(__file__).parents[1] / "conf"
STAGES = ("sft", "reward", "ppo", "grpo", "dpo", "evaluate")
EVERY = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))
NEEDED = {
    "data=jsonl": ["data.train=x.jsonl"],
    "data=hub": ["data.train=owner/name"],
    "model=pretrained": ["model.path=x"],
}
# keywords that run.py gives: none of them belongs into a yaml
BY_RUN = {"callbacks", "logger"}
# arguments of a loss or estimator that the stage gives
BY_STAGE = {"chosen", "rejected", "log_ratios", "desirable", "kl", "beta", "rewards", "response_mask", "group_size"}
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def composed(*overrides: str) -> DictConfig:
    """The configuration of ``train.py`` with these overrides, with what data and model cannot do without."""
    needed = [extra for choice in overrides for extra in NEEDED.get(choice, [])]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*overrides, *needed])


def choices(group: str) -> list[str]:
    return [name.split("/")[1] for name in EVERY if name.startswith(f"{group}/")]


def keywords(function: Any) -> dict[str, inspect.Parameter]:
    """Every keyword a class or function takes; ``**keys`` stands for those of the next class up."""
    if not inspect.isclass(function):
        return dict(inspect.signature(function).parameters)
    found: dict[str, inspect.Parameter] = {}
    for cls in function.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        for parameter in parameters:
            found.setdefault(parameter.name, parameter)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return {name: parameter for name, parameter in found.items() if parameter.kind not in VARIADIC}


def required(target: str) -> set[str]:
    """Keywords without a default; of a library's class only its own, since it may fill in those of the next class."""
    wanted = get_object(target)
    own = keywords(wanted) if target.startswith("rlhf.") else inspect.signature(wanted).parameters
    return {name for name, p in own.items() if p.default is p.empty and p.kind not in VARIADIC}


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a ``_target_``, wherever it stands."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}".lstrip("."))


def plain(cfg: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=False)


def combinations() -> list[tuple[str, ...]]:
    """Every stage with every data and model, and every choice of the other groups with one stage."""
    crossed = [
        (f"stage={stage}", f"model={model}", f"data={data}")
        for stage in choices("stage")
        for model in choices("model")
        for data in choices("data")
    ]
    trainers = [(f"stage={stage}", f"trainer={name}") for stage in ("sft", "ppo") for name in choices("trainer")]
    others = [("stage=sft", f"{group}={name}") for group in ("logger", "callbacks") for name in choices(group)]
    online = [(f"stage={stage}", f"reward={name}") for stage in ("ppo", "grpo") for name in choices("reward")]
    online += [("stage=grpo", f"advantage={name}") for name in choices("advantage")]
    online += [("stage=dpo", f"loss={name}") for name in choices("loss")]
    deltas = [(f"{group}={name}",) for group in ("experiment", "sweep") for name in choices(group)]
    return [*crossed, *trainers, *others, *online, *deltas]


@pytest.mark.parametrize("overrides", combinations(), ids=" ".join)
def test_every_choice_composes_into_keywords_of_its_classes(overrides: tuple[str, ...]) -> None:
    """The signature is the schema: no key that its class does not take, none left out that it needs."""
    cfg = plain(composed(*overrides))
    found = dict(targets(cfg))
    assert {"model", "trainer"} <= found.keys()
    assert {"stage", "data"} <= found.keys() or cfg["stage_name"] == "pipeline"
    for path, node in found.items():
        taken = keywords(get_object(node["_target_"]))
        given = node.keys() - {"_target_", "_partial_", "_convert_", "_recursive_"}
        assert given <= taken.keys(), f"{path}: {sorted(given - taken.keys())} are no keywords of {node['_target_']}"
        missing = required(node["_target_"]) - BY_RUN - given
        if node.get("_partial_"):  # the stage gives what is measured, and beta
            missing -= BY_STAGE
        assert not missing, f"{path}: {sorted(missing)} have neither a value nor a default"
        assert not BY_RUN & given


def test_no_yaml_is_left_out() -> None:
    """Every file of conf/ is a choice that the test above makes, config.yaml, a base of others, or Hydra's own."""
    tried = {override.lstrip("+").replace("=", "/") for combination in combinations() for override in combination}
    assert {name for name in EVERY if not name.startswith("hydra/")} - tried == {"config", "rl/default"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_shows_all_its_keys(stage: str) -> None:
    """Whatever a stage's classes take can be typed without a plus: it stands in the composed configuration."""
    cfg = plain(composed(f"stage={stage}"))
    for part in ("stage", "data", "model"):
        missing = keywords(get_class(cfg[part]["_target_"])).keys() - cfg[part].keys() - BY_RUN
        assert not missing, f"{part}.{sorted(missing)} cannot be typed"


def test_trainer_auto_lists_every_argument_of_the_trainer() -> None:
    """All but those that run.py or logger= and callbacks= give, and those that this project has no use for."""
    elsewhere = {"logger", "callbacks", "limit_predict_batches", "enable_autolog_hparams", "model_registry"}
    listed = OmegaConf.load(CONF / "trainer" / "auto.yaml").keys() - {"_target_"}
    assert listed == inspect.signature(lightning.Trainer).parameters.keys() - elsewhere


def test_a_run_is_one_folder() -> None:
    """Stages of a run lie beside each other; Hydra's own folder is the stage's."""
    for stage in STAGES:
        cfg = composed(f"stage={stage}", "run=qwen", "paths.root=/r")
        folder = "evaluation" if stage == "evaluate" else stage
        assert (cfg.stage_name, cfg.paths.output) == (stage, f"/r/qwen/{folder}")
        assert cfg.trainer.default_root_dir == cfg.paths.output
        assert cfg.callbacks.checkpoint.dirpath == f"/r/qwen/{folder}/checkpoints"


def test_defaults_stay_inside_the_published_ranges() -> None:
    """For the shipped small models: the ranges that the user documentation promises."""
    sft, ppo = composed("stage=sft"), composed("stage=ppo")
    assert 1e-4 <= float(sft.stage.learning_rate) <= 5e-4
    assert 4 <= sft.data.batch_size <= 16
    assert float(ppo.stage.learning_rate) == 3e-4
    assert 16 <= ppo.data.batch_size <= 64
    assert 0.1 <= ppo.stage.clip_range <= 0.3
    assert 0.9 <= ppo.stage.gae_lambda <= 0.99
    assert 0.95 <= ppo.stage.gamma <= 0.99


def test_numbers_are_numbers() -> None:
    """A yaml 1e-4 is text to some readers: every value whose default is a float is a number, not a string."""
    for stage in STAGES:
        for path, node in targets(plain(composed(f"stage={stage}"))):
            for name, parameter in keywords(get_object(node["_target_"])).items():
                if isinstance(parameter.default, float) and node.get(name) is not None:
                    assert isinstance(node[name], float | int), f"{path}.{name}={node[name]!r}"
