"""``rlhf.main.run``: stage, pipeline or command, and the output directory of a job of a multirun."""

import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

import rlhf.pipeline  # noqa: F401  Imported before a test replaces what it imports.
from contract.configs import hydra_command
from rlhf import main
from rlhf.errors import ConfigError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, DictConfig]]:
    """Name and configuration of each call of ``run_stage`` and ``run_pipeline``, which do nothing."""
    found: list[tuple[str, DictConfig]] = []

    def record(name: str) -> Any:
        def run(cfg: DictConfig) -> float:
            found.append((name, cfg))
            return 0.5

        return run

    monkeypatch.setattr("rlhf.run.run_stage", record("run_stage"))
    monkeypatch.setattr("rlhf.pipeline.run_pipeline", record("run_pipeline"))
    return found


@pytest.mark.parametrize(
    ("overrides", "function"), [((), "run_pipeline"), (("stage=sft",), "run_stage"), (("stage=evaluate",), "run_stage")]
)
def test_a_command_runs_the_pipeline_or_its_stage(
    calls: list[tuple[str, DictConfig]], overrides: tuple[str, ...], function: str
) -> None:
    """The monitored metric is passed on. Outside of a multirun, the configuration is passed on as it is."""
    with hydra_command(*overrides) as cfg:
        assert main.run(cfg) == 0.5
        assert [name for name, _ in calls] == [function]
        assert calls[0][1] is cfg


@pytest.mark.parametrize("overrides", [(), ("stage=sft",)])
def test_a_job_of_a_multirun_gets_a_copy(
    calls: list[tuple[str, DictConfig]], tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """Only the copy's ``paths.output`` is the directory of the job, and what refers to it follows."""
    multirun = ["hydra.mode=MULTIRUN", f"hydra.runtime.output_dir='{tmp_path / 'job'}'"]
    with hydra_command(*overrides, *multirun) as cfg:
        before = OmegaConf.to_yaml(cfg)
        main.run(cfg)
        assert OmegaConf.to_yaml(cfg) == before
        ((_, own),) = calls
        assert own.paths.output == str(tmp_path / "job")
        assert own.trainer.default_root_dir == str(tmp_path / "job")
        assert own.paths.run == cfg.paths.run


@pytest.mark.parametrize(("begun", "resume"), [(False, False), (True, True)])
def test_resume_starts_the_jobs_that_have_not_begun(
    calls: list[tuple[str, DictConfig]], tmp_path: Path, begun: bool, resume: bool
) -> None:
    """Outside of a multirun, ``resume=true`` requires a checkpoint."""
    if begun:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "last.ckpt").touch()
    command = ["stage=sft", "resume=true", f"paths.output={tmp_path}"]
    for mode in ("hydra.mode=MULTIRUN", "hydra.mode=RUN"):
        with hydra_command(*command, mode, f"hydra.runtime.output_dir={tmp_path}") as cfg:
            main.run(cfg)
    assert [cfg.resume for _, cfg in calls] == [resume, True]


@pytest.mark.parametrize("key", ["speed", "paths.run", "paths.root", "pipeline", "pipeline.overrides"])
def test_what_cannot_be_null_is_rejected(
    calls: list[tuple[str, DictConfig]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """The directory ``None``, which Hydra has created, is removed."""
    monkeypatch.chdir(tmp_path)
    with hydra_command(f"{key}=null") as cfg:
        Path(cfg.paths.output).mkdir(parents=True)
        with pytest.raises(ConfigError) as error:
            main.run(cfg)
    assert str(error.value) == f"{key} must not be null.\n  Leave it out, or give it a value."
    assert calls == []
    assert not Path("None").exists()


def test_check_must_be_a_known_choice(calls: list[tuple[str, DictConfig]]) -> None:
    with (
        hydra_command("stage=sft", "check=onyl") as cfg,
        pytest.raises(ConfigError, match=r"^check must be false, true or only, got onyl\.\n  Set check=true"),
    ):
        main.run(cfg)
    assert calls == []


@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_command_is_called_with_the_configuration(
    calls: list[tuple[str, DictConfig]], monkeypatch: pytest.MonkeyPatch, exit_code: int
) -> None:
    """Its own keys are keywords. A result other than 0 is the exit code of the process."""
    received: list[Any] = []
    monkeypatch.setattr("rlhf.runs.list_runs", lambda cfg, *, sweeps: received.append((cfg, sweeps)) or exit_code)
    with hydra_command("stage=runs", "command.sweeps=true") as cfg:
        if exit_code:
            with pytest.raises(SystemExit) as stopped:
                main.run(cfg)
            assert stopped.value.code == exit_code
        else:
            assert math.isnan(main.run(cfg))
        assert received == [(cfg, True)]
    assert calls == []


def test_keys_of_a_command_are_checked() -> None:
    with (
        hydra_command("stage=doctor", "command.examples=many") as cfg,
        pytest.raises(ConfigError, match=r"^command.examples must be an integer of at least 0, got 'many'"),
    ):
        main.run(cfg)
