"""The steps of the pipeline: which are allowed, how each is configured, in which order they run."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from contract.configs import hydra_command
from rlhf import pipeline
from rlhf.errors import ConfigError
from rlhf.overrides import quote, to_override
from rlhf.pipeline import check_steps, output_table, run_pipeline, step_config, step_overrides

RLOO = "+pipeline.variants.rloo=['stage=grpo','advantage=rloo']"


# Which steps are allowed


@pytest.mark.parametrize("overrides", [(), ("experiment=compare",), (RLOO, "pipeline.steps=[sft,rloo]")])
def test_stages_and_variants_are_steps(overrides: tuple[str, ...]) -> None:
    with hydra_command(*overrides) as cfg:
        check_steps(cfg, list(cfg.pipeline.steps))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["pipeline.steps=[sft,pop]"],
            "pipeline.steps and pipeline.overrides must name known steps, got pop.\n"
            "  Known steps: sft, reward, ppo, grpo, dpo, collect, evaluate.",
        ),
        (
            [RLOO, "+pipeline.overrides.pop=['seed=1']"],
            "pipeline.steps and pipeline.overrides must name known steps, got pop.\n"
            "  Known steps: sft, reward, ppo, grpo, dpo, collect, evaluate, rloo.",
        ),
        (
            ["+pipeline.variants.dpo=['stage=dpo','loss=ipo']"],
            "pipeline.variants.dpo has the name of a stage.\n  Choose another name for the variant.",
        ),
        (
            ["pipeline.steps=[sft]", "pipeline.overrides.ppo=['stage.kl_coef=0.1']"],
            "pipeline.overrides.ppo has no effect: pipeline.steps=[sft] lacks this step.\n"
            "  Remove pipeline.overrides.ppo, or add ppo to pipeline.steps.",
        ),
    ],
)
def test_inconsistent_steps_are_rejected(overrides: list[str], message: str) -> None:
    with hydra_command(*overrides) as cfg, pytest.raises(ConfigError) as error:
        check_steps(cfg, list(cfg.pipeline.steps))
    assert str(error.value) == message


def test_all_steps_run_on_the_same_processes(tmp_path: Path) -> None:
    """A step on one device would be run by every process of the others."""
    own = "pipeline.overrides.evaluate=['trainer.devices=1','trainer.strategy=auto']"
    command = [f"paths.root={tmp_path}", "trainer=ddp", "trainer.devices=2", "pipeline.steps=[sft,evaluate]", own]
    with hydra_command(*command) as cfg, pytest.raises(ConfigError) as error:
        run_pipeline(cfg)
    assert str(error.value) == (
        "pipeline.overrides.evaluate sets trainer.strategy=auto, but step sft has ddp: all steps of a pipeline run on "
        "the same processes.\n  Set trainer.strategy=ddp for all steps, or run step evaluate by its own command."
    )


# How a step is configured


def test_a_step_is_configured_as_its_own_command(tmp_path: Path) -> None:
    """The overrides of the command line apply to every step; those of ``pipeline.*`` concern the pipeline only."""
    command = ["seed=3", "model.hidden_size=32", "pipeline.steps=[sft,dpo]", "run=all", f"paths.root={tmp_path}"]
    with hydra_command(*command) as cfg:
        found = step_config(step_overrides(cfg, "dpo", tmp_path / "all"))
    with hydra_command("stage=dpo", "seed=3", "model.hidden_size=32", "run=all", f"paths.root={tmp_path}") as expected:
        assert {**found, "paths": None} == {**expected, "paths": None}
        assert OmegaConf.to_container(found.paths, resolve=True) == OmegaConf.to_container(expected.paths, resolve=True)


def test_the_overrides_of_a_step_win_over_the_command_line() -> None:
    """They come last. Other steps keep the value of the command line."""
    with hydra_command("data.batch_size=8", "pipeline.overrides.dpo=['data.batch_size=4']") as cfg:
        assert step_config(step_overrides(cfg, "dpo", Path("/r/rlhf"))).data.batch_size == 4
        assert step_config(step_overrides(cfg, "sft", Path("/r/rlhf"))).data.batch_size == 8


def test_the_precision_of_a_step_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.config.has_bfloat16", lambda accelerator: accelerator == "cpu")
    with hydra_command("trainer=cpu", "trainer.precision=auto") as cfg:
        assert step_config(step_overrides(cfg, "dpo", Path("/r/rlhf"))).trainer.precision == "bf16-mixed"


def test_the_command_line_wins_over_a_variant() -> None:
    """A variant chooses groups and values that the command line may change."""
    variant = "+pipeline.variants.low=['stage=dpo','stage.beta=0.01','loss=ipo']"
    with hydra_command(variant, "seed=3") as cfg:
        found = step_config(step_overrides(cfg, "low", Path("/r/rlhf")))
        assert (found.stage_name, found.stage.beta, found.seed) == ("dpo", 0.01, 3)
        assert found.stage.loss._target_.endswith("ipo_loss")


def test_a_variant_has_its_own_directory(tmp_path: Path) -> None:
    """It shares the run, and so its inputs, with the other steps. A directory may contain ``=`` and ``,``."""
    directory = tmp_path / "seed=1,run=a"
    with hydra_command(RLOO, "run=a") as cfg:
        rloo, grpo = (step_config(step_overrides(cfg, step, directory)) for step in ("rloo", "grpo"))
    assert (rloo.stage_name, rloo.paths.output) == ("grpo", str(directory / "rloo"))
    assert grpo.paths.output == str(directory / "grpo")
    assert rloo.paths.run == grpo.paths.run == str(directory)
    assert rloo.callbacks.checkpoint.dirpath == str(directory / "rloo" / "checkpoints")


def test_an_apostrophe_in_a_directory_is_kept(recorded_steps: list[DictConfig], tmp_path: Path) -> None:
    """Of the steps of a job of a sweep, of a variant, and of a round."""
    directory = tmp_path / "it's" / "rlhf"
    steps = ["pipeline.steps=[sft,reward,rloo]", "pipeline.rounds=2", "pipeline.round.accumulate=true"]
    with hydra_command(RLOO, *steps, f"paths.root={quote(directory.parent)}") as cfg:
        run_pipeline(cfg)
        cfg.paths.output = str(directory / "job")
        run_pipeline(cfg)
    for step in recorded_steps:
        assert step.paths.output.startswith(f"{directory}/")
    assert recorded_steps[-2].stage.policy == f"{directory}/job/round_1/dpo/dpo_final.pt"
    assert recorded_steps[-3].stage.include == [f"{directory}/job/round_1/collect/preferences.jsonl"]


def test_overrides_of_a_variant_apply_to_it() -> None:
    with hydra_command(RLOO, "+pipeline.overrides.rloo=['data.batch_size=2']") as cfg:
        assert step_config(step_overrides(cfg, "rloo", Path("/r"))).data.batch_size == 2
        assert step_config(step_overrides(cfg, "grpo", Path("/r"))).data.batch_size != 2


def test_a_directory_for_all_steps_is_rejected(recorded_steps: list[DictConfig], tmp_path: Path) -> None:
    command = [f"paths.root={tmp_path}", f"paths.output={tmp_path}/x"]
    with hydra_command(*command) as cfg, pytest.raises(ConfigError, match="write to different directories"):
        run_pipeline(cfg)
    assert recorded_steps == []


# Running


def test_steps_run_in_their_order(recorded_steps: list[DictConfig], tmp_path: Path) -> None:
    """The metric of the last one is returned, and the directory of the pipeline contains its configuration."""
    with hydra_command(f"paths.root={tmp_path}", RLOO, "pipeline.steps=[sft,reward,rloo]") as cfg:
        assert run_pipeline(cfg) == 3.0
    assert [cfg.stage_name for cfg in recorded_steps] == ["sft", "reward", "grpo"]
    assert OmegaConf.load(tmp_path / "rlhf" / "pipeline" / ".hydra" / "config.yaml") == cfg
    log = (tmp_path / "rlhf" / "pipeline" / "pipeline.log").read_text()
    assert [f"step {number} of 3: {name}" in log for number, name in enumerate(("sft", "reward", "rloo"), 1)]


def test_a_mistyped_key_of_a_later_step_is_reported_before_the_first_one(
    recorded_steps: list[DictConfig], tmp_path: Path
) -> None:
    command = [f"paths.root={tmp_path}", "pipeline.overrides.dpo=['stage.betta=0.1']"]
    with hydra_command(*command) as cfg, pytest.raises(ConfigCompositionException, match="betta"):
        run_pipeline(cfg)
    assert recorded_steps == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["pipeline.steps=[sft,ppo]"],
            "stage=ppo requires the output of stage=reward, but run=rlhf has no {run}/reward/",
        ),
        (
            ["pipeline.steps=[reward,sft]"],
            "stage=reward requires the output of stage=sft, but run=rlhf has no {run}/sft/",
        ),
        (
            ["pipeline.steps=[sft,dpo]", "pipeline.overrides.dpo=['stage.policy={run}/other.pt']"],
            "{run}/other.pt: there is no such file.",
        ),
        (
            ["pipeline.steps=[reward]", "pipeline.rounds=1", "model=pretrained", "model.path=x"],
            "{run}/sft/sft_final.pt: ",
        ),
        (
            ["pipeline.steps=[sft,evaluate]", "pipeline.overrides.evaluate=['stage.models=[sft,dpo]']"],
            "stage.models contains dpo, but run=rlhf has no dpo model.",
        ),
    ],
)
def test_a_missing_input_of_a_later_step_is_reported_before_the_first_one(
    recorded_steps: list[DictConfig], tmp_path: Path, overrides: list[str], message: str
) -> None:
    run = tmp_path / "rlhf"
    command = [f"paths.root={tmp_path}", *(override.format(run=run) for override in overrides)]
    with hydra_command(*command) as cfg, pytest.raises(ConfigError) as error:
        run_pipeline(cfg)
    assert str(error.value).startswith(message.format(run=run))
    assert recorded_steps == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["pipeline.steps=[sft,ppo]", "pipeline.overrides.ppo=['reward=exact_match']"],
        ["pipeline.steps=[reward,dpo]", "model=pretrained", "model.path=x"],
        ["pipeline.steps=[sft,dpo]", "pipeline.overrides.dpo=['stage.policy={run}/sft/checkpoints/last.ckpt']"],
        ["pipeline.steps=[sft,dpo]", "pipeline.overrides.dpo=['stage.policy=owner/name']"],
        [RLOO, "pipeline.steps=[sft,reward,rloo,evaluate]", "pipeline.overrides.evaluate=['stage.models=[sft,rloo]']"],
        ["pipeline.steps=[sft]", "pipeline.rounds=2", "pipeline.overrides.collect=['reward=exact_match']"],
    ],
)
def test_an_input_that_is_not_needed_or_made_by_an_earlier_step_may_be_missing(
    recorded_steps: list[DictConfig], tmp_path: Path, overrides: list[str]
) -> None:
    command = [f"paths.root={tmp_path}", *(override.format(run=tmp_path / "rlhf") for override in overrides)]
    with hydra_command(*command) as cfg:
        run_pipeline(cfg)
    assert recorded_steps


def test_a_job_of_a_sweep_is_a_separate_run(recorded_steps: list[DictConfig], tmp_path: Path) -> None:
    """``rlhf.main`` sets ``paths.output`` to the directory of the job: it takes the place of the run's directory."""
    with hydra_command(f"paths.root={tmp_path}", "pipeline.steps=[sft,dpo]") as cfg:
        cfg.paths.output = str(tmp_path / "job")
        run_pipeline(cfg)
    assert [step.paths.run for step in recorded_steps] == [str(tmp_path / "job")] * 2
    assert [step.paths.output for step in recorded_steps] == [str(tmp_path / "job" / name) for name in ("sft", "dpo")]
    assert not (tmp_path / "rlhf").exists()


@pytest.mark.parametrize("root", ["{}/", "{}/.", "{}//sub/"])
def test_the_root_may_be_written_as_a_shell_completes_it(
    recorded_steps: list[DictConfig], tmp_path: Path, root: str
) -> None:
    """The steps then write to the same directories as with the normalized path."""
    with hydra_command(f"paths.root={root.format(tmp_path)}", "pipeline.steps=[sft]") as cfg:
        run_pipeline(cfg)
    run = Path(root.format(tmp_path)) / "rlhf"
    assert [Path(step.paths.output) for step in recorded_steps] == [run / "sft"]


@pytest.fixture
def started_run(recorded_steps: list[DictConfig], tmp_path: Path) -> Path:
    """A run whose SFT stage has stored its configuration."""
    (tmp_path / "rlhf" / "sft" / ".hydra").mkdir(parents=True)
    (tmp_path / "rlhf" / "sft" / ".hydra" / "config.yaml").write_text("stage_name: sft\n")
    return tmp_path / "rlhf"


@pytest.mark.parametrize("wanted", [True, False])
def test_the_report_is_written_at_the_end(started_run: Path, wanted: bool) -> None:
    command = (f"paths.root={started_run.parent}", "pipeline.steps=[sft]", f"pipeline.report={wanted}")
    with hydra_command(*command) as cfg:
        run_pipeline(cfg)
    assert (started_run / "report.html").is_file() == wanted


def test_a_pipeline_without_outputs_has_no_report(recorded_steps: list[DictConfig], tmp_path: Path) -> None:
    with hydra_command(f"paths.root={tmp_path}", "pipeline.steps=[evaluate]") as cfg:
        run_pipeline(cfg)
    assert not (tmp_path / "rlhf" / "report.html").exists()


def test_a_report_that_fails_is_a_warning(
    started_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The pipeline ends as it would without a report, and the warning has the command that repeats it."""

    def fail(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(pipeline, "write_run_report", fail)
    with hydra_command(f"paths.root={started_run.parent}", "pipeline.steps=[sft]") as cfg:
        assert run_pipeline(cfg) == 1.0
    (warning,) = [record.getMessage() for record in caplog.records if "report" in record.getMessage()]
    assert warning == (
        "The report could not be written (OSError: no space). To repeat it: python train.py stage=report run=rlhf "
        f"paths.root={started_run.parent}"
    )


def test_the_table_lists_the_files_that_exist(tmp_path: Path) -> None:
    """A row per step, then the final model and the command for TensorBoard. Brackets are not the markup of rich."""
    with hydra_command(
        to_override("paths.root", tmp_path / "exp[a1]" / "[/b]"), "pipeline.steps=[sft,evaluate]"
    ) as cfg:
        directory = Path(cfg.paths.run)
        configs = {step: step_config(step_overrides(cfg, step, directory)) for step in cfg.pipeline.steps}
    for name in ("sft/sft_final.pt", "sft/sft.log", "evaluation/metrics.json", "final_rl_model.pt"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    table = output_table(directory, configs, {"sft": 61.4, "evaluate": 8.7})
    columns = {str(column.header): list(map(str, column.cells)) for column in table.columns}
    assert table.title == "Outputs; 70 s in total"
    assert columns["step"] == ["sft", "evaluate", "result", "curves"]
    assert columns["seconds"] == ["61", "9", "", ""]
    assert columns["files"][:2] == [
        f"{directory}/sft/sft_final.pt\n{directory}/sft/sft.log",
        f"{directory}/evaluation/metrics.json",
    ]
    call = f'load_model("{directory}/final_rl_model.pt")'
    assert columns["files"][2:] == [f"{directory}/final_rl_model.pt   ({call})", f"tensorboard --logdir '{directory}'"]
    Console(width=20, quiet=True).print(table)
    console = Console(width=500, file=StringIO())
    console.print(table)
    assert [text for text in columns["files"][1:] if text not in console.file.getvalue()] == []
