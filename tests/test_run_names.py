"""Names of the directories of runs and jobs, and command lines in messages that contain them."""

import re
import shlex
from pathlib import Path

import pytest

from contract.configs import hydra_command
from rlhf import run_names
from rlhf.run_names import command_in_run, job_name


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("loss=ipo,stage.beta=0.1", "loss=ipo,beta=0.1"),
        ("stage.betas=[0.9,0.99]", r"betas=_0.9,0.99-\w{8}"),
        ("stage.eps=1,callbacks.eps=2", "stage.eps=1,callbacks.eps=2"),  # One short name for both would be ambiguous.
        ("stage.policy=/a/b.pt", r"policy=_a_b.pt-\w{8}"),
        ("stage.policy=" + "x" * 300, r"policy=x{93}-\w{8}"),
        ("loss=ipo,overwrite=true,run=mine,stage=dpo", "loss=ipo"),
        ("data.template=" + "是" * 120, r"template=是{30}-\w{8}"),  # 100 bytes: 9, and 3 for each character
        ("stage.beta=0.43557259109182184,seed=1", r"beta=0.4356,seed=1-\w{8}"),
        ("stage.eps=4.252744858000656e-05", r"eps=4.253e-05-\w{8}"),
        ("run=mine,stage=dpo", "job"),
        ("", "job"),
    ],
)
def test_jobs_have_short_names(overrides: str, name: str) -> None:
    assert re.fullmatch(name if "\\" in name else re.escape(name), job_name(overrides))


def test_what_a_sweep_iterates_over_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is not cut off."""
    monkeypatch.setattr(run_names, "swept_keys", {"seed"})
    name = job_name(f"stage.policy={'x' * 200},seed=3")
    assert re.fullmatch(r"seed=3,policy=x+-\w{8}", name)
    assert len(name) <= 110


def test_a_sweep_over_runs_or_experiments_names_its_jobs_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, all of its jobs would have the same directory."""
    monkeypatch.setattr(run_names, "swept_keys", {"experiment", "run"})
    assert job_name("experiment=a,run=b,stage=ppo") == "experiment=a,run=b"


def test_names_of_different_jobs_differ() -> None:
    """Also where the characters in which they differ cannot be part of a name."""
    assert job_name("stage.policy=/a/b") != job_name("stage.policy=/a_b")
    assert job_name("x=" + "a" * 200) != job_name("x=" + "a" * 201)


def test_the_default_directory_of_all_runs_is_left_out() -> None:
    assert command_in_run(Path("outputs/rlhf"), "stage=dpo") == "python train.py stage=dpo run=rlhf"
    assert command_in_run(Path("/r/outputs/a b")) == "python train.py 'run=a b' paths.root=/r/outputs"


@pytest.mark.parametrize("directory", ["outputs/mine", "/r/it's/a b", "/r/a,b=c/seed=1,x=2", "other/a+b"])
def test_the_command_runs_in_the_directory(directory: str) -> None:
    """Whatever characters the shell and Hydra treat specially."""
    command = shlex.split(command_in_run(Path(directory), "stage=dpo"))
    with hydra_command(*command[2:]) as cfg:
        assert cfg.paths.run == directory
