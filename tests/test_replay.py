"""``replay=<directory>``: the command that an error shows repeats the step and finds the row, whatever started it."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from contract.configs import compose_config, hydra_command
from harness import PAIRS, TINY_DATA, TINY_MODEL, run_train
from rlhf import main
from rlhf.command import command_line
from rlhf.errors import ConfigError
from rlhf.models import Frozen
from rlhf.pipeline import step_config, step_overrides
from rlhf.replay import check_same_config, first_nonfinite_output


@pytest.fixture(scope="session")
def architecture() -> str:
    """Replays do not depend on the architecture."""
    return "transformer"


def test_the_command_in_the_error_replays_the_step(repo: Path, tmp_path: Path) -> None:
    """A margin that float32 cannot hold is on line 3. The replay writes nothing new to the dump."""
    rows = tmp_path / "rows.jsonl"
    text = "".join(json.dumps({**row, "margin": -1e39 if n == 2 else 0.0}) + "\n" for n, row in enumerate(PAIRS))
    rows.write_text(text)
    tiny = [*TINY_MODEL["transformer"], *TINY_DATA, "run=a b", "data=jsonl", "data.val_fraction=0"]
    run_train(repo, tmp_path, "stage=sft", *tiny, "data=demo", "stage.samples=0", "trainer.max_steps=1")
    failed = run_train(repo, tmp_path, "stage=reward", f"data.train={rows}", *tiny, check=False)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert f"Rows: {rows}:3\n" in failed.stderr
    (command,) = (line.split("Find the cause: ")[1] for line in failed.stderr.splitlines() if "Find the cause" in line)
    overrides = shlex.split(command)[2:]
    directory = Path(overrides[-1].removeprefix("replay="))
    before = {path.name for path in directory.iterdir()}
    again = run_train(repo, tmp_path, *overrides)
    lines = [line for line in again.stdout.splitlines() if "jsonl:3 " in line]
    assert len(lines) == 1
    assert "nan" in lines[0] or "inf" in lines[0]
    assert "First module with an output that is not finite: none" in again.stdout
    assert {path.name for path in directory.iterdir()} == before == {"batches_rank0.pt", "report.json", "state.ckpt"}
    assert not (tmp_path / "a b" / "reward" / "reward_model_final.pt").exists()
    other = run_train(repo, tmp_path, *overrides, "stage.centering_coef=0.5", check=False)
    assert other.returncode == 2
    assert "stage.centering_coef was 0.0 and is 0.5" in other.stderr


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["stage=ppo", "stage.kl_coef=0.2", "run=a b", "resume=true"], "stage=ppo stage.kl_coef=0.2 'run=a b'"),
        (["experiment=ppo_n_plus", "seed=2"], "stage=ppo experiment=ppo_n_plus seed=2"),
    ],
)
def test_the_command_of_a_stage(typed: list[str], expected: str) -> None:
    with hydra_command(*typed):
        assert command_line(compose_config("stage=ppo")) == f"python train.py {expected}"


def test_the_command_of_a_step_of_the_pipeline(tmp_path: Path) -> None:
    """A variant has the overrides that define it, and a step of a sweep the directory of its job."""
    typed = ["run=x", '+pipeline.variants.low=["stage=ppo","reward=exact_match"]', '+pipeline.overrides.low=["seed=2"]']
    with hydra_command(*typed) as cfg:
        directory = Path(cfg.paths.run)
        overrides = step_overrides(cfg, "low", directory)
        assert command_line(step_config(overrides), overrides) == (
            f"python train.py stage=ppo reward=exact_match 'paths.output='\"'\"'{directory}/low'\"'\"'' run=x seed=2"
        )
        overrides = step_overrides(cfg, "low", tmp_path)
        assert f"paths.run='\"'\"'{tmp_path}'\"'\"'" in command_line(step_config(overrides), overrides)


def test_only_keys_that_matter_are_compared(tmp_path: Path) -> None:
    config: dict[str, Any] = {"stage": {"beta": 0.1, "loss": {"a": 1}}, "seed": 1, "run": "one"}
    check_same_config({**config, "run": "other"}, config, tmp_path)
    check_same_config(config, {}, tmp_path)  # The run was not started by train.py.
    with pytest.raises(ConfigError, match=r"seed was 1 and is 2; stage\.loss\.a was 1 and is 3\.\n  Repeat"):
        check_same_config({**config, "seed": 2, "stage": {"beta": 0.1, "loss": {"a": 3}}}, config, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["replay={folder}"], "requires a stage that trains, got stage=pipeline"),
        (["stage=evaluate", "replay={folder}"], "requires a stage that trains, got stage=evaluate"),
        (["stage=sft", "replay={folder}"], "the directory contains no dump of a training step"),
    ],
)
def test_a_replay_needs_a_dump_and_a_stage(tmp_path: Path, overrides: list[str], message: str) -> None:
    typed = [override.format(folder=f"'{tmp_path}'") for override in overrides]
    with hydra_command(*typed) as cfg, pytest.raises(ConfigError, match=message):
        main.run(cfg)


def test_the_first_module_is_found_also_in_frozen_models() -> None:
    """The second of three layers returns NaN, and with it the third and the model."""
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        layers[1].bias[0] = math.nan
    module = nn.Module()
    module.frozen = Frozen(layers)
    with first_nonfinite_output(module) as found:
        module.frozen(torch.ones(1, 2))
    assert found == ["frozen.model.1"]
    with first_nonfinite_output(module) as found:
        layers[0](torch.ones(1, 2))
    assert found == ["none"]
