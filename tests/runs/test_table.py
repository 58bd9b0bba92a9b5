"""The terminal output of ``stage=runs``, and what it costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from contract.configs import compose_config
from rlhf.errors import ConfigError
from rlhf.runs import list_runs


def test_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither terminal sequences nor the markup of rich in the name of a directory have an effect."""
    for name in ("[red]a[bold]", "b\x1b[2J"):
        directory = tmp_path / name / "sft" / ".hydra"
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text("stage_name: sft\n")
    (tmp_path / "b\x1b[2J" / "sweeps" / "dpo" / "job").mkdir(parents=True)
    assert list_runs(compose_config("stage=runs", f"paths.root={tmp_path}")) == 0
    shown = capsys.readouterr().out
    assert "[red]a[bold]" in shown
    assert "b\\x1b[2J" in shown
    assert "sweeps that are not shown: 1." in shown
    assert "command.sweeps=true" in shown


def test_a_directory_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list_runs(compose_config("stage=runs", f"paths.root={tmp_path}")) == 0
    assert "There are no runs" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^paths.root=.*nowhere: there is no such directory\.\n  Set paths.root=<"):
        list_runs(compose_config("stage=runs", f"paths.root={tmp_path / 'nowhere'}"))


def test_the_command_loads_no_heavy_library_and_writes_nothing(repo: Path, tmp_path: Path) -> None:
    """It takes about a second, since neither torch nor transformers is imported."""
    (tmp_path / "mine" / "sft" / ".hydra").mkdir(parents=True)
    (tmp_path / "mine" / "sft" / ".hydra" / "config.yaml").write_text("stage_name: sft\n")
    before = sorted(tmp_path.rglob("*"))
    root = sorted(path.name for path in repo.iterdir())
    command = [sys.executable, "-X", "importtime", "train.py", "stage=runs", f"paths.root={tmp_path}"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "rich" in imported
    assert imported.isdisjoint({"torch", "transformers", "lightning", "datasets"})
    assert "no checkpoint" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before
    assert sorted(path.name for path in repo.iterdir()) == root
