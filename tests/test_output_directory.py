"""A command that is rejected before training starts leaves nothing in its directory."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from contract.configs import compose_config, hydra_command
from harness import TINY_DATA, TINY_MODEL
from rlhf import files as files_module
from rlhf.errors import ConfigError, UserError, explain
from rlhf.main import run
from rlhf.output_directory import OutputDirectory
from rlhf.run import run_stage

SFT = ["stage=sft", "stage.samples=0", "trainer.max_steps=1", "trainer.enable_progress_bar=false"]
TINY = [*TINY_MODEL["transformer"], *TINY_DATA]


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


@pytest.fixture(scope="module")
def trained_sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of SFT."""
    root = tmp_path_factory.mktemp("sft")
    run_stage(compose_config(*SFT, *TINY, f"paths.root={root}"))
    return root / "rlhf" / "sft" / "sft_final.pt"


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.mark.parametrize(
    "rejected",
    [
        "stage.learning_rate=-1",  # by the configuration
        "resume=true",  # because there is nothing to resume
        "model.num_heads=3",  # when the model is made
        "data.columns.target=foo",  # when the data are read
        "data.template=Hello",  # when the data are encoded
        "+data.columns.foo=target",  # by a constructor that Hydra calls
        "model.vocab_size=???",  # by OmegaConf
    ],
)
def test_a_rejected_command_writes_nothing(tmp_path: Path, rejected: str) -> None:
    with hydra_command(*SFT, *TINY, f"paths.root={tmp_path}", rejected) as cfg:
        Path(cfg.paths.output).mkdir(parents=True)  # Hydra makes it.
        with pytest.raises(Exception) as error:
            run(cfg)
    assert explain(error.value)
    assert not files(tmp_path)


def test_a_rejected_command_leaves_an_earlier_run_as_it_was(tmp_path: Path) -> None:
    """This includes the result that it would have replaced."""
    run_stage(compose_config(*SFT, *TINY, f"paths.root={tmp_path}"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UserError):
        run_stage(compose_config(*SFT, *TINY, f"paths.root={tmp_path}", "overwrite=true", "data.template=Hello"))
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


@pytest.mark.parametrize("stopped", [("check=only",), ("trainer=debug",)])
def test_an_earlier_result_is_replaced_only_when_training_starts(tmp_path: Path, stopped: tuple[str, ...]) -> None:
    run_stage(compose_config(*SFT, *TINY, f"paths.root={tmp_path}"))
    run_stage(compose_config(*SFT, *TINY, f"paths.root={tmp_path}", "overwrite=true", *stopped))
    assert (tmp_path / "rlhf" / "sft" / "sft_final.pt").exists()
    assert (tmp_path / "rlhf" / "sft" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("stopped", [("check=only",), ("trainer=debug",)])
@pytest.mark.parametrize(
    ("stage", "names"),
    [
        (
            ["stage=collect", "reward=python", "reward.path=data/gold.py:score"],
            ["preferences.jsonl", "candidates.jsonl"],
        ),
        (["stage=evaluate"], ["metrics.json", "samples.jsonl"]),
    ],
    ids=["collect", "evaluate"],
)
def test_collected_pairs_and_evaluations_are_not_replaced_by_a_trial(
    tmp_path: Path, trained_sft: Path, stage: list[str], names: list[str], stopped: tuple[str, ...]
) -> None:
    output = tmp_path / stage[0].removeprefix("stage=")
    output.mkdir()
    for name in names:
        (output / name).write_text("{}\n")
    model = f"stage.policy={trained_sft}" if output.name == "collect" else f"stage.models={{sft: {trained_sft}}}"
    run_stage(compose_config(*stage, *TINY_DATA, f"paths.root={tmp_path}", f"paths.output={output}", model, *stopped))
    assert {path.name for path in output.iterdir()} - {".lock"} == set(names)
    assert all((output / name).read_text() == "{}\n" for name in names)


def test_checks_leave_the_configuration_of_a_result(tmp_path: Path) -> None:
    """The report shows it as that of the result."""
    configuration = tmp_path / "rlhf" / "sft" / ".hydra" / "config.yaml"
    run_stage(compose_config(*SFT, *TINY, f"paths.root={tmp_path}"))
    before = configuration.read_bytes()
    run_stage(compose_config(*SFT, *TINY, f"paths.root={tmp_path}", "stage.learning_rate=0.5", "check=only"))
    assert configuration.read_bytes() == before
    run_stage(compose_config(*SFT, *TINY, f"paths.root={tmp_path}", "stage.learning_rate=0.5", "overwrite=true"))
    assert configuration.read_bytes() != before


def test_a_run_that_starts_over_removes_the_earlier_logs(tmp_path: Path) -> None:
    """Otherwise, the report would mix the curves, warnings and times of two runs."""
    output = tmp_path / "rlhf" / "sft"
    run_stage(compose_config(*SFT, *TINY, f"paths.root={tmp_path}", "trainer.log_every_n_steps=1"))
    (version,) = (output / "tensorboard").iterdir()
    (version / "mark").touch()
    log = (output / "sft.log").read_text()
    run_stage(compose_config(*SFT, *TINY, f"paths.root={tmp_path}", "resume=true", "trainer.max_steps=2"))
    assert (output / "sft.log").read_text().startswith(log)
    assert (version / "mark").exists()
    run_stage(compose_config(*SFT, *TINY, f"paths.root={tmp_path}", "overwrite=true", "trainer.log_every_n_steps=1"))
    (only,) = (output / "tensorboard").iterdir()
    assert any(only.glob("events.*"))
    assert not (only / "mark").exists()
    messages = (output / "sft.log").read_text()
    assert "\0" not in messages
    assert messages.count("step=1 ") == messages.count(" took ") == 1


def test_a_second_process_does_not_touch_the_files_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process writes a file while the second one finds out that the directory is locked."""
    path = tmp_path / "rlhf" / "sft" / "checkpoints" / "last.ckpt"

    @contextmanager
    def locked(directory: Path) -> Iterator[None]:
        path.parent.mkdir(parents=True)
        path.touch()
        with lock(directory), lock(directory):
            yield

    lock = files_module.locked
    monkeypatch.setattr("rlhf.output_directory.locked", locked)
    with pytest.raises(ConfigError, match="is in use by another process"):
        run_stage(compose_config(*SFT, *TINY, f"paths.root={tmp_path}"))
    assert path.exists()


def test_a_rejected_command_leaves_the_directories_of_other_commands(tmp_path: Path) -> None:
    """Its own directory contains theirs: they started after it."""
    other = tmp_path / "runs" / "ppo" / "checkpoints" / "last.ckpt"
    directory = OutputDirectory(compose_config(*SFT, f"paths.root={tmp_path}"), tmp_path / "runs", "sft.log")
    with directory.opened():
        other.parent.mkdir(parents=True)
        other.touch()
        (tmp_path / "runs" / "ppo" / ".lock").touch()
        (tmp_path / "runs" / "new").touch()
    assert other.exists()
    assert not (tmp_path / "runs" / "new").exists()


def test_a_debugging_run_writes_nothing(tmp_path: Path) -> None:
    run_stage(compose_config(*SFT, *TINY, f"paths.root={tmp_path}", "trainer=debug"))
    assert not files(tmp_path / "rlhf" / "sft")


def test_an_accepted_command_writes_configuration_and_log(tmp_path: Path) -> None:
    with hydra_command(*SFT, *TINY, f"paths.root={tmp_path}") as cfg:
        run(cfg)
    output = tmp_path / "rlhf" / "sft"
    assert OmegaConf.load(output / ".hydra" / "config.yaml") == cfg
    assert "stage=sft" in OmegaConf.load(output / ".hydra" / "overrides.yaml")
    assert "hydra" in OmegaConf.load(output / ".hydra" / "hydra.yaml")
    assert "read" in (output / "sft.log").read_text(), "messages from before the start are in the log"


def test_the_log_of_a_bug_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("rlhf.run.build_trainer", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run_stage(compose_config(*SFT, *TINY, f"paths.root={tmp_path}"))
    assert "read" in (tmp_path / "rlhf" / "sft" / "sft.log").read_text()


def test_a_pipeline_whose_first_step_is_rejected_writes_nothing(tmp_path: Path) -> None:
    steps = json.dumps([*SFT[1:], "data.template=Hello"])
    command = [*TINY, f"paths.root={tmp_path}", "pipeline.steps=[sft]", f"pipeline.overrides.sft={steps}"]
    with hydra_command(*command) as cfg:
        Path(cfg.paths.output).mkdir(parents=True)
        with pytest.raises(ConfigError, match="template"):
            run(cfg)
    assert not files(tmp_path)
