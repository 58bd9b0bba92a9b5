"""Command lines in messages."""

import shlex
from pathlib import Path

import pytest

from contract.configs import hydra_command
from rlhf.command import command_in_run


def test_the_default_directory_of_all_runs_is_left_out() -> None:
    assert command_in_run(Path("outputs/rlhf"), "stage=dpo") == "python train.py stage=dpo run=rlhf"
    assert command_in_run(Path("/r/outputs/a b")) == "python train.py 'run=a b' paths.root=/r/outputs"


@pytest.mark.parametrize("directory", ["outputs/mine", "/r/it's/a b", "/r/a,b=c/seed=1,x=2", "other/a+b"])
def test_the_command_runs_in_the_directory(directory: str) -> None:
    """Whatever characters the shell and Hydra treat specially."""
    command = shlex.split(command_in_run(Path(directory), "stage=dpo"))
    with hydra_command(*command[2:]) as cfg:
        assert cfg.paths.run == directory
