"""``rlhf.main.run``: stage or pipeline, and the output directory of a job of a multirun."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

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

    monkeypatch.setattr(main, "run_stage", record("run_stage"))
    monkeypatch.setattr(main, "run_pipeline", record("run_pipeline"))
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


def test_check_must_be_a_known_choice(calls: list[tuple[str, DictConfig]]) -> None:
    with (
        hydra_command("stage=sft", "check=onyl") as cfg,
        pytest.raises(ConfigError, match=r"^check must be false, true or only, got onyl\.\n  Set check=true"),
    ):
        main.run(cfg)
    assert calls == []
