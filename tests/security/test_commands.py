"""Hostile files and names given to ``train.py``: exit code 2, one message, and nothing is written."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from security import hostile
from security.hostile import Bomb, Workshop
from transformers import PreTrainedTokenizerFast

from contract.configs import compose_config
from harness import DEMONSTRATIONS, PAIRS, TINY_DATA, TINY_MODEL, TinyRun, run_train
from rlhf.config import check_choices
from rlhf.data.files import read_rows
from rlhf.errors import ConfigError, DataError, UserError
from rlhf.main import run
from rlhf.run import run_stage
from rlhf.run_names import check_run_name, check_run_override


@pytest.fixture
def work(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    canary = tmp_path / "canary"
    canary.mkdir()
    yield Workshop(tmp_path / "hostile", canary, tokenizer)
    assert not list(canary.iterdir())


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


# Names of runs


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "..",
        ".",
        ".hidden",
        "",
        "a/b",
        "a\\b",
        "/tmp/x",
        "C:x",
        "a\0b",
        "a\nb",
        " a",
        "x" * 300,
        "ü" * 101,
        None,
    ],
)
def test_a_run_cannot_leave_its_folder(name: str | None) -> None:
    with pytest.raises(ConfigError, match=r"^run must be a plain name .*\n  Set run=<name>"):
        check_run_name(name)


@pytest.mark.parametrize("name", ["rlhf", "smollm_2-135M", "lr=0.1,beta=2", "ü" * 100, 7, "a.b", "seed 1"])
def test_plain_names_of_runs_are_accepted(name: object) -> None:
    check_run_name(name)


@pytest.mark.parametrize("argument", ["run=../../x", "run='../x'", "++run=/tmp/x", "run=", "run=a/b", "run=a,../b"])
def test_a_command_is_refused_before_hydra_creates_a_directory(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"^run must be a plain name"):
        check_run_override(["stage=sft", argument])


def test_other_arguments_are_not_names_of_runs() -> None:
    check_run_override(["-m", "run=a,b", "paths.root=../elsewhere", "data.train=../x.jsonl", "stage.policy=../x.pt"])


def test_a_run_named_in_a_configuration_file_is_checked() -> None:
    """``check_run_override`` sees the command line only."""
    cfg = compose_config("stage=sft")
    check_choices(cfg)
    cfg.run = "../x"
    with pytest.raises(ConfigError, match=r"^run must be a plain name"):
        run(cfg)


def test_the_command_exits_with_code_2_and_writes_nothing(repo: Path, tmp_path: Path) -> None:
    done = run_train(repo, tmp_path / "outputs", "stage=sft", "run=../escaped", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("run must be a plain name")
    assert not list(tmp_path.iterdir())


def test_a_hostile_policy_on_the_command_line(repo: Path, work: Workshop, tmp_path: Path) -> None:
    """With the variable of torch that makes other programs run pickles."""
    path = hostile.within_an_export(work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        overrides = ["stage=dpo", *TINY_DATA, f"stage.policy={path}", "run=x"]
        done = run_train(repo, tmp_path / "outputs", *overrides, check=False)
    assert done.returncode == 2
    assert "Nothing in it was run" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "outputs").rglob("*.pt"))


# Checkpoints that a run continues from


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., DictConfig]:
    def compose(name: str, *overrides: str) -> DictConfig:
        tiny = [*TINY_MODEL["transformer"], *TINY_DATA, "trainer.enable_progress_bar=false"]
        return compose_config(f"stage={name}", *tiny, f"paths.root={tmp_path / 'outputs'}", "run=x", *overrides)

    return compose


@pytest.mark.parametrize("variable", ["0", "1"])
@pytest.mark.parametrize("build", [hostile.whole_file, hostile.legacy_format, hostile.plain_pickle])
def test_resuming_runs_no_pickle(
    work: Workshop, stage: Any, monkeypatch: pytest.MonkeyPatch, build: Any, variable: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", variable)
    work.folder = tmp_path / "outputs" / "x" / "sft" / "checkpoints"
    work.folder.mkdir(parents=True)
    build(work, "last.ckpt")
    with pytest.raises((UserError, pickle.UnpicklingError, RuntimeError)):
        run_stage(stage("sft", "resume=true"))
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("variable", ["0", "1"])
def test_lightning_runs_no_pickle_of_a_valid_checkpoint(
    work: Workshop, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """The checkpoint is valid except for its hyperparameters. ``rlhf.run`` calls ``fit`` in the same way."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", variable)
    finished = tiny_run.train("sft", trainer={"max_steps": 1})
    path = tmp_path / "last.ckpt"
    finished.trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "hyper_parameters": Bomb(work.canary)}, path)
    with pytest.raises(Exception, match="Weights only load failed"):
        tiny_run.build("sft", trainer={"max_steps": 2}).fit(path)


def test_settings_in_a_checkpoint_are_not_instantiated(work: Workshop, tiny_run: TinyRun, tmp_path: Path) -> None:
    finished = tiny_run.train("sft", trainer={"max_steps": 1})
    path = tmp_path / "last.ckpt"
    finished.trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    evil = {"_target_": "os.system", "_class_path": "os.system", "command": f"touch {work.canary / 'ran'}"}
    torch.save({**content, "hyper_parameters": evil}, path)
    assert tiny_run.build("sft", trainer={"max_steps": 2}).fit(path).trainer.global_step >= 1


# Data


@pytest.mark.parametrize("kind", ["script", "folder", "hub"])
def test_a_script_of_a_data_set_is_not_run(work: Workshop, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = work.evil_module("x")["x"]
    path = work.path("evil.py")
    path.write_text(code)
    (work.folder / "hostile.py").write_text(code)
    monkeypatch.chdir(work.folder.parent)
    with pytest.raises(DataError):
        read_rows({"script": str(path), "folder": str(work.folder), "hub": "hostile"}[kind])


def test_a_row_cannot_name_code(work: Workshop, tmp_path: Path, stage: Any) -> None:
    """Fields that would configure something elsewhere are ignored; the scorer is named on the command line only."""
    evil = {"_target_": "os.system", "command": f"touch {work.canary / 'ran'}", "reward.path": "evil.py:score"}
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({**row, **evil}) for row in DEMONSTRATIONS * 4))
    run_stage(stage("sft", f"data.train={file}", f"data.val={file}", "trainer.max_steps=1", "stage.samples=0"))
    assert not list(work.canary.iterdir())


def test_a_cache_of_reference_logprobs_runs_no_pickle(
    work: Workshop, tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is computed again."""
    data = {"train": tiny_run.write("pairs", PAIRS)}
    cache = tmp_path / "cache"
    first = tiny_run.train("dpo", data=data, ref_logprobs_cache=str(cache), trainer={"max_steps": 1})
    files = list(cache.glob("*.pt"))
    assert files
    for file in files:
        torch.save({"logprobs": Bomb(work.canary)}, file)
    again = tiny_run.train("dpo", data=data, ref_logprobs_cache=str(cache), trainer={"max_steps": 1})
    assert "is not a valid file of reference log-probs" in caplog.text
    assert again.curve("train/loss") == first.curve("train/loss")
