"""Rounds of the pipeline: what each step reads and writes, and what is rejected."""

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from omegaconf import DictConfig

from contract.configs import hydra_command
from harness import TINY_DATA, TINY_MODEL, run_train
from rlhf import load_model
from rlhf.errors import ConfigError
from rlhf.pipeline import run_pipeline
from rlhf.rounds import check_round

INCOMPLETE = "pipeline.round.steps must start with collect and contain one stage that trains a policy, got ["
ROUNDS = ["pipeline.steps=[sft,reward]", "pipeline.rounds=2"]


@pytest.fixture(scope="session")
def architecture() -> str:
    """Rounds run the same stages as ``test_train.py``, which has both architectures."""
    return "transformer"


def steps_of(recorded_steps: list[DictConfig], directory: Path) -> list[str]:
    return [Path(cfg.paths.output).relative_to(directory).as_posix() for cfg in recorded_steps]


def test_each_round_trains_the_policy_of_the_round_before(recorded_steps: list[DictConfig], tmp_path: Path) -> None:
    """Collection, DPO and evaluation, twice. The last policy is the final model."""
    with hydra_command(f"paths.root={tmp_path}", *ROUNDS) as cfg:
        assert run_pipeline(cfg) == 8.0
    run = tmp_path / "rlhf"
    rounds = [f"round_{number}/{stage}" for number in (1, 2) for stage in ("collect", "dpo", "evaluate")]
    assert steps_of(recorded_steps, run) == ["sft", "reward", *rounds]
    found: dict[str, Any] = dict(zip(rounds, recorded_steps[2:], strict=True))
    policies = {"sft": f"{run}/sft/sft_final.pt"}
    for number, before in ((1, "sft"), (2, "round_1")):
        name = f"round_{number}"
        assert found[f"{name}/collect"].stage.policy == found[f"{name}/dpo"].stage.policy == policies[before]
        assert found[f"{name}/dpo"].data.train == f"{run}/{name}/collect/preferences.jsonl"
        assert found[f"{name}/dpo"].data.val is None
        policies[name] = f"{run}/{name}/dpo/dpo_final.pt"
        assert found[f"{name}/evaluate"].stage.models == policies
        assert found[f"{name}/evaluate"].stage.baseline == "sft"
        assert found[f"{name}/collect"].stage.output == f"{run}/{name}/collect/preferences.jsonl"
    assert [found[f"round_{number}/collect"].seed for number in (1, 2)] == [1001, 2001]
    assert (run / "final_rl_model.pt").read_text() == f"result of {run}/round_2/dpo"


def test_a_round_may_train_a_reward_model_first(recorded_steps: list[DictConfig], tmp_path: Path) -> None:
    """It starts from the SFT model in each round, and PPO uses it. Pairs of earlier rounds come first."""
    steps = ["pipeline.round.steps=[collect,reward,ppo]", "pipeline.round.accumulate=true"]
    with hydra_command(f"paths.root={tmp_path}", *ROUNDS, *steps) as cfg:
        run_pipeline(cfg)
    run = tmp_path / "rlhf"
    collect, reward, ppo = recorded_steps[-3:]
    assert reward.stage.policy == f"{run}/sft/sft_final.pt"
    assert reward.data.train == f"{run}/round_2/collect/preferences.jsonl"
    assert ppo.stage.policy == f"{run}/round_1/ppo/ppo_final.pt"
    assert ppo.stage.reward_model == f"{run}/round_2/reward/reward_model_final.pt"
    assert ppo.data.train == "data/rl_train.jsonl"
    assert list(collect.stage.include) == [f"{run}/round_1/collect/preferences.jsonl"]
    assert list(recorded_steps[2].stage.include) == []


def test_overrides_of_a_step_apply_in_every_round(recorded_steps: list[DictConfig], tmp_path: Path) -> None:
    own = "pipeline.overrides.collect=['stage.num_generations=4']"
    with hydra_command(f"paths.root={tmp_path}", *ROUNDS, own) as cfg:
        run_pipeline(cfg)
    assert [cfg.stage.num_generations for cfg in recorded_steps if cfg.stage_name == "collect"] == [4, 4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "pipeline.round.steps=[collect,sft]",
            "pipeline.round.steps must consist of collect, reward, ppo, grpo, dpo, evaluate, got sft.",
        ),
        ("pipeline.round.steps=[dpo]", INCOMPLETE),
        ("pipeline.round.steps=[collect,reward]", INCOMPLETE),
        ("pipeline.round.steps=[collect,dpo,ppo]", INCOMPLETE),
        ("pipeline.round.policy=nothing", "pipeline.round.policy must be a stage of the run or a file, got nothing."),
    ],
)
def test_inconsistent_rounds_are_rejected(override: str, message: str) -> None:
    with hydra_command(*ROUNDS, override) as cfg, pytest.raises(ConfigError) as error:
        check_round(cfg)
    assert str(error.value).startswith(message)
    assert "\n  Set pipeline.round." in str(error.value)


@pytest.mark.slow
def test_a_round_of_every_kind_runs(repo: Path, tmp_path: Path, architecture: str) -> None:
    """DPO with labels of a reward model. With ``resume=true``, a second command trains nothing."""
    command = [
        *(*TINY_MODEL[architecture], *TINY_DATA),
        *("pipeline.steps=[sft,reward]", "pipeline.rounds=1", "pipeline.report=false", "stage=pipeline"),
        "pipeline.overrides.collect=['data.num_prompts=16']",
        "pipeline.overrides.evaluate=['data.max_rows=8']",
    ]
    run_train(repo, tmp_path, *command)
    run = tmp_path / "rlhf"
    rows = [json.loads(line) for line in (run / "round_1" / "collect" / "preferences.jsonl").open(newline="\n")]
    assert 0 < len(rows) <= 16
    assert all(row["chosen_score"] > row["rejected_score"] for row in rows)
    metrics = json.loads((run / "round_1" / "evaluate" / "metrics.json").read_text())
    assert set(metrics["models"]) == {"sft", "round_1", "target"}
    assert load_model("rl_trained", outputs=str(tmp_path)) is not None
    final = (run / "round_1" / "dpo" / "dpo_final.pt").read_bytes()
    again: CompletedProcess[str] = run_train(repo, tmp_path, *command, "resume=true")
    assert again.stdout.count("is finished") == 4
    assert (run / "round_1" / "dpo" / "dpo_final.pt").read_bytes() == final
