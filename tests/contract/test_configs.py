"""Every yaml in ``conf/`` composes, and every key is a keyword of the class or function that its ``_target_`` names."""

import inspect

import lightning
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, get_object
from omegaconf import OmegaConf

from contract.configs import (
    CONF,
    HYDRA_KEYS,
    STAGES,
    YAML_FILES,
    combinations,
    compose_config,
    composed_dict,
    hydra_command,
    keywords,
    required_keywords,
    targets,
)
from rlhf.stages import commands

# Keywords that run.py and main.py fill in; no yaml may contain them.
FROM_RUN = {"callbacks", "logger", "tokenizer", "cfg"}
# Arguments of losses and advantage estimators that the stage fills in.
FROM_STAGE = {
    *("chosen", "rejected", "margins", "chosen_lengths", "rejected_lengths", "beta"),
    *("log_ratios", "desirable", "kl"),
    *("rewards", "scores", "kl_penalty", "response_mask", "values", "group_size", "gamma", "gae_lambda"),
}


@pytest.mark.parametrize("overrides", combinations(), ids=" ".join)
def test_every_choice_composes_into_keywords_of_its_classes(overrides: tuple[str, ...]) -> None:
    """The signature is the schema: a yaml has no unknown key and leaves out no required one."""
    cfg = composed_dict(*overrides)
    found = dict(targets(cfg))
    assert {"model", "trainer"} <= found.keys()
    assert {"stage", "data"} <= found.keys() or "command" in found or cfg["stage_name"] == "pipeline"
    for path, node in found.items():
        target, given = node["_target_"], node.keys() - HYDRA_KEYS
        unknown = given - keywords(get_object(target)).keys()
        assert not unknown, f"{path}: {sorted(unknown)} are not keywords of {target}"
        missing = required_keywords(target) - FROM_RUN - given
        if node.get("_partial_"):
            missing -= FROM_STAGE
        assert not missing, f"{path}: {sorted(missing)} have neither a value nor a default"
        assert not FROM_RUN & given, f"{path}: run.py fills in {sorted(FROM_RUN & given)}"


def test_every_yaml_is_composed() -> None:
    """The test above composes every file except config.yaml, shared bases, and Hydra's own groups."""
    composed = {override.lstrip("+").replace("=", "/") for overrides in combinations() for override in overrides}
    assert {name for name in YAML_FILES if not name.startswith("hydra/")} - composed == {"config", "rl/default"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_lists_every_keyword_of_its_classes(stage: str) -> None:
    """Every keyword can be overridden without a plus sign."""
    cfg = composed_dict(f"stage={stage}")
    for part in ("stage", "data", "model"):
        missing = keywords(get_class(cfg[part]["_target_"])).keys() - cfg[part].keys() - FROM_RUN
        assert not missing, f"{part}: {sorted(missing)} are missing from the yaml"


@pytest.mark.parametrize("command", commands())
def test_a_command_lists_every_keyword_and_writes_nothing(command: str) -> None:
    """Hydra would create an output directory and store the configuration in it."""
    with hydra_command(f"stage={command}") as cfg:
        assert keywords(get_object(cfg.command._target_)).keys() == {"cfg"} | cfg.command.keys() - HYDRA_KEYS
        assert HydraConfig.get().output_subdir is None
        assert HydraConfig.get().run.dir == "."


def test_trainer_auto_lists_every_argument_of_the_trainer() -> None:
    """Exceptions: arguments that run.py fills in, and those that have no use here."""
    elsewhere = {"logger", "callbacks", "limit_predict_batches", "enable_autolog_hparams", "model_registry"}
    listed = OmegaConf.load(CONF / "trainer" / "auto.yaml").keys() - {"_target_"}
    assert listed == inspect.signature(lightning.Trainer).parameters.keys() - elsewhere


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_of_a_run_share_a_directory(stage: str) -> None:
    cfg = compose_config(f"stage={stage}", "run=qwen", "paths.root=/r")
    directory = "evaluation" if stage == "evaluate" else stage
    assert (cfg.stage_name, cfg.paths.output) == (stage, f"/r/qwen/{directory}")
    assert cfg.trainer.default_root_dir == cfg.paths.output
    assert cfg.callbacks.checkpoint.dirpath == f"/r/qwen/{directory}/checkpoints"


def test_defaults_are_within_the_published_ranges() -> None:
    """The ranges that the documentation gives for the small models trained from scratch."""
    sft, ppo = compose_config("stage=sft"), compose_config("stage=ppo")
    assert 1e-4 <= float(sft.stage.learning_rate) <= 5e-4
    assert 4 <= sft.data.batch_size <= 16
    assert float(ppo.stage.learning_rate) == 3e-4
    assert 16 <= ppo.data.batch_size <= 64
    assert 0.1 <= ppo.stage.clip_range <= 0.3
    assert 0.9 <= ppo.stage.gae_lambda <= 0.99
    assert 0.95 <= ppo.stage.gamma <= 0.99


@pytest.mark.parametrize("stage", STAGES)
def test_floats_are_not_strings(stage: str) -> None:
    """Some yaml readers take ``1e-4`` for text: a value whose default is a float must be a number."""
    for path, node in targets(composed_dict(f"stage={stage}")):
        for name, parameter in keywords(get_object(node["_target_"])).items():
            if isinstance(parameter.default, float) and node.get(name) is not None:
                assert isinstance(node[name], float | int), f"{path}.{name}={node[name]!r}"
