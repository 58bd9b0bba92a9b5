"""The table of every switch, conf/README.md, walked: each override changes the trained weights or is refused."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerFast

from helpers import PROMPTS, Fixed
from rlhf.errors import explain
from test_configs import composed, plain

STAGES = {
    "What PPO and GRPO share": "ppo",
    "PPO": "ppo",
    "GRPO, RLOO, REINFORCE++": "grpo",
    "Preferences: DPO and its relatives": "dpo",
    "Reward model": "reward",
}
# small enough for a test, and far enough from the start that clip ranges, ratios and moments are at work
SMALL = [
    "data=jsonl",
    "data.batch_size=8",
    "data.max_length=64",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=null",
    "stage.learning_rate=1e-3",
    "stage.schedule=constant",
]
ONLINE = ["stage.sampling.max_new_tokens=8", "stage.minibatch_size=4", "stage.ppo_epochs=2"]
OWN = {"ppo": ONLINE, "grpo": ONLINE, "dpo": ["stage.ref_logprobs_cache=null"], "reward": ["data.demonstrations=null"]}


@dataclass(frozen=True)
class Switch:
    """A row of the table: what is typed, and what has to be typed beside it."""

    stage: str
    key: str
    default: str
    override: str
    beside: tuple[str, ...]


def switches() -> list[Switch]:
    rows, stage = [], ""
    for line in (Path(__file__).parents[1] / "conf" / "README.md").read_text().splitlines():
        if line.startswith("## "):
            stage = STAGES[line.removeprefix("## ")]
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 6, line
            typed = re.findall(r"`([^`]+)`", cells[5])
            rows.append(Switch(stage, cells[0].strip("`"), cells[1], typed[0] if typed else "", tuple(typed[1:])))
    return rows


SWITCHES = switches()
TYPED = [switch for switch in SWITCHES if switch.override]


class Bench:
    """Trains small stages from typed overrides; the same overrides give the same weights."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, policy: Fixed, judge: Fixed) -> None:
        self.folder, self.tokenizer, self.policy, self.judge = folder, tokenizer, policy, judge
        self.rows = folder / "rows.jsonl"  # pairs, and read for their prompts where a policy answers
        rows = [
            {"prompt": prompt, "chosen": f"so {n}", "rejected": "It rains " * n} for n, prompt in enumerate(PROMPTS)
        ]
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.seen: dict[tuple[str, ...], dict[str, Any]] = {}

    def weights(self, stage: str, *typed: str) -> dict[str, Any]:
        """Weights of everything trained, after a run of these overrides."""
        key = (stage, *sorted(typed))
        if key not in self.seen:
            self.seen[key] = self.train(stage, typed)
        return self.seen[key]

    def train(self, stage: str, typed: tuple[str, ...]) -> dict[str, Any]:
        cfg = composed(f"stage={stage}", *SMALL, *OWN[stage], *typed)
        cfg.data.update({"train": str(self.rows), "val_fraction": 0.0})
        parents = {
            name: {"policy": self.policy, "reward_model": self.judge}[name]
            for name in ("policy", "reward_model")
            if name in cfg.stage
        }
        module = instantiate(cfg.stage, _partial_=True)(**parents)
        data = instantiate(cfg.data)
        module.tokenizer = data.tokenizer = self.tokenizer
        lightning.seed_everything(3, verbose=False)
        flags = {**OmegaConf.to_container(cfg.trainer), "default_root_dir": str(self.folder)}
        trainer = instantiate(
            {**flags, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}, logger=False
        )
        trainer.fit(module, data)
        return {name: value.clone() for name, value in module.state_dict().items() if value.is_floating_point()}


@pytest.fixture(scope="session")
def architecture() -> str:
    """One is enough: what the switches do does not depend on it."""
    return "transformer"


@pytest.fixture(scope="module")
def seen() -> dict[tuple[str, ...], dict[str, Any]]:
    """Weights of runs that several rows compare with."""
    return {}


@pytest.fixture
def bench(
    seen: dict[tuple[str, ...], dict[str, Any]],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    policy: Fixed,
    judge: Fixed,
) -> Bench:
    bench = Bench(tmp_path, tokenizer, policy, judge)
    bench.seen = seen
    return bench


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    learned = [name for name in one if name.startswith(("policy.", "critic.", "model."))]
    if one.keys() != other.keys():
        return False
    return all(one[name].shape == other[name].shape and torch.equal(one[name], other[name]) for name in learned)


@pytest.mark.parametrize("switch", TYPED, ids=lambda switch: f"{switch.stage} {switch.override}")
def test_every_switch_changes_the_outcome_or_is_refused(switch: Switch, bench: Bench) -> None:
    without = bench.weights(switch.stage, *switch.beside)
    try:
        with_it = bench.weights(switch.stage, *switch.beside, switch.override)
    except Exception as error:
        refusal = explain(error)
        if refusal is None:
            raise
        if switch.key.split(".")[-1] not in refusal:
            pytest.fail(f"the refusal does not name the key: {refusal}")
        return
    assert not same(with_it, without)


def test_a_run_without_a_change_is_the_same_run(bench: Bench) -> None:
    """Otherwise the test above could not fail."""
    assert same(bench.train("ppo", ()), bench.weights("ppo"))


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: f"{switch.stage} {switch.key}")
def test_defaults_in_the_table_are_those_of_the_configuration(switch: Switch) -> None:
    beside = [override for override in switch.beside if override.startswith(("advantage=", "loss="))]
    if "=" in switch.key:  # a choice that is no default
        return
    if "." not in switch.key:  # a choice of a group
        assert (Path(__file__).parents[1] / "conf" / switch.key / f"{switch.default}.yaml").is_file()
        return
    value = OmegaConf.select(composed(f"stage={switch.stage}", *beside), switch.key, default="no such key")
    assert switch.default == (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


@pytest.mark.parametrize("stage", sorted(set(STAGES.values())))
def test_no_switch_is_left_out(stage: str) -> None:
    """Every key of a stage stands in the table, but what it starts from and the optimizer's keys."""
    elsewhere = {"stage.policy", "stage.reward_model", "stage.reward"}
    elsewhere |= {
        f"stage.{key}" for key in ("learning_rate", "weight_decay", "betas", "eps", "schedule", "warmup_ratio")
    }
    keys = {f"stage.{key}" for key in leaves(plain(composed(f"stage={stage}"))["stage"])}
    assert keys - elsewhere <= {switch.key for switch in SWITCHES}


def leaves(node: dict[str, Any], above: str = "") -> list[str]:
    found = []
    for key, value in node.items():
        if key.startswith("_"):
            continue
        found += leaves(value, f"{above}{key}.") if isinstance(value, dict) else [f"{above}{key}"]
    return found
