"""Every option has an effect: its override changes the trained weights, or is rejected with an error that names it."""

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerFast

from contract.configs import STAGES, compose_config, composed_dict, leaf_keys, paired_choices
from contract.option_effects import EFFECTS, ELSEWHERE, Effect
from harness import PROMPTS, FakeSource, quick_trainer
from rlhf.errors import explain
from rlhf.stages import stages

# Small, and far enough from the start that clip ranges, ratios and moments matter.
SMALL = [
    "data=jsonl",
    "data.batch_size=8",
    "data.max_length=64",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=null",
    "stage.learning_rate=1e-3",
    "stage.schedule=constant",
]
ON_POLICY = ["stage.sampling.max_new_tokens=8", "stage.minibatch_size=4", "stage.ppo_epochs=2"]
SMALL_STAGE = {
    "sft": ["stage.samples=0", "data.val_fraction=0"],
    "ppo": ON_POLICY,
    "grpo": ON_POLICY,
    "dpo": ["stage.ref_logprobs_cache=null"],
    "reward": ["data.demonstrations=null", "stage.output=null"],
}
SMALL_MODEL = [f"model.{setting}=16" for setting in ("hidden_size", "intermediate_size")]
SMALL_MODEL += ["model.num_layers=1", "model.num_heads=2", "model.vocab_size=300"]


def is_from_scratch(overrides: Sequence[str]) -> bool:
    """Return whether a policy is built from the options of a model."""
    return any(override.startswith("model") for override in overrides)


class Bench:
    """Trains small stages from overrides; equal overrides give equal weights, which are cached."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerFast, policy: FakeSource, reward_model: FakeSource
    ) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.inputs = {"policy": policy, "reward_model": reward_model}
        self.rows = folder / "rows.jsonl"  # every kind of record in one
        rows = [
            {"prompt": prompt, "completion": f"so {n}", "chosen": f"so {n}", "rejected": "It rains " * n}
            for n, prompt in enumerate(PROMPTS)
        ]
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.cache: dict[tuple[str, ...], dict[str, Any]] = {}

    def weights(self, stage: str, *overrides: str) -> dict[str, Any]:
        """Return the weights after training with these overrides."""
        key = (stage, *sorted(overrides))
        if key not in self.cache:
            self.cache[key] = self.train(stage, overrides)
        return self.cache[key]

    def config(self, stage: str, *overrides: str) -> DictConfig:
        """Compose the configuration of a small stage."""
        small_model = SMALL_MODEL if is_from_scratch(overrides) and "model=mamba" not in overrides else []
        model = [*small_model, "model.vocab_size=300"] if is_from_scratch(overrides) else []
        filled = [override.format(rows=self.rows) for override in overrides]
        cfg = compose_config(f"stage={stage}", *SMALL, *SMALL_STAGE[stage], *model, *filled)
        cfg.data.train = str(self.rows)
        return cfg

    def train(self, stage: str, overrides: tuple[str, ...]) -> dict[str, Any]:
        cfg = self.config(stage, *overrides)
        lightning.seed_everything(3, verbose=False)
        data = instantiate(cfg.data)
        inputs = {name: self.inputs[name] for name in stages()[stage].inputs}
        tokenizer = self.tokenizer
        if is_from_scratch(overrides):
            inputs["policy"] = instantiate(cfg.model)
            tokenizer = inputs["policy"].tokenizer(data.training_texts())
        module = instantiate(cfg.stage, _partial_=True)(**inputs)
        module.tokenizer = data.tokenizer = tokenizer
        lightning.seed_everything(3, verbose=False)
        flags = {name: value for name, value in OmegaConf.to_container(cfg.trainer).items() if name != "_target_"}
        silent = {"enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
        quick_trainer(**{**flags, **silent, "default_root_dir": str(self.folder)}).fit(module, data)
        tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
        return {name: value.clone() for name, value in tensors.items() if value.is_floating_point()}


@pytest.fixture(scope="session")
def architecture() -> str:
    """Effects of options do not depend on the architecture."""
    return "transformer"


@pytest.fixture(scope="module")
def cache() -> dict[tuple[str, ...], dict[str, Any]]:
    """Weights of runs that several tests compare with."""
    return {}


@pytest.fixture
def bench(
    cache: dict[tuple[str, ...], dict[str, Any]],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    policy: FakeSource,
    reward_model: FakeSource,
) -> Bench:
    bench = Bench(tmp_path, tokenizer, policy, reward_model)
    bench.cache = cache
    return bench


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return True if all trained weights are equal."""
    trained = [name for name in one if name.startswith(("policy.", "critic.", "model."))]
    if one.keys() != other.keys():
        return False
    return all(one[name].shape == other[name].shape and torch.equal(one[name], other[name]) for name in trained)


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: " ".join([effect.stage, *effect.given, effect.override]))
def test_every_option_changes_the_weights_or_is_rejected(effect: Effect, bench: Bench) -> None:
    # A model option is compared with the small model, which the first override selects without a change.
    model = ("model.num_layers=1",) if effect.key.startswith("model.") else ()
    overrides = (*effect.given, *model, effect.override)
    bench.config(effect.stage, *overrides)  # An unknown key is an error here, and not a rejection.
    without = bench.weights(effect.stage, *effect.given, *model)
    try:
        with_it = bench.weights(effect.stage, *overrides)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        assert effect.key.split(".")[-1] in message, f"the error does not name the key: {message}"
        return
    assert not same(with_it, without)


def test_equal_overrides_give_equal_weights(bench: Bench) -> None:
    """Otherwise the test above could not fail."""
    assert same(bench.train("ppo", ()), bench.weights("ppo"))


def own_keys(*overrides: str) -> set[str]:
    """Return the keys of the stage, its data, its model and its reward function; evaluation trains nothing."""
    cfg = composed_dict(*overrides)
    nodes = {
        name: cfg[name] for name in ("stage", "data", "model", "adapter", "reward") if isinstance(cfg.get(name), dict)
    }
    keys = leaf_keys(nodes)
    return {key for key in keys if not key.endswith((".reward", "._target_"))}


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stages()[stage].exports])
def test_every_option_is_in_the_table(stage: str) -> None:
    """Also those of every choice of model, loss, advantage estimator and reward function."""
    keys = own_keys(f"stage={stage}", "data=jsonl")
    groups = [group for group in ("model", "adapter", *stages()[stage].groups) if group != "rl"]
    for chosen in paired_choices(*groups):
        keys |= own_keys(f"stage={stage}", "data=jsonl", *chosen)
    listed = {effect.key for effect in EFFECTS}
    missing = {key for key in keys - listed if not any(fnmatch(key, pattern) for pattern in ELSEWHERE)}
    assert missing == set(), "add an override to tests/contract/option_effects.py"
