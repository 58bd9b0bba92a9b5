"""How a stage starts: from the beginning, from a checkpoint, or not at all because it is finished."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from contract.configs import compose_config, hydra_command
from harness import EXACT, TINY_DATA, TINY_MODEL
from rlhf import run
from rlhf.checkpoint.resume import damage, remove_earlier
from rlhf.errors import ConfigError, DataError
from rlhf.export import Export
from rlhf.files import locked
from rlhf.pipeline import run_pipeline
from rlhf.run import run_stage

SFT = ["stage=sft", "stage.samples=0", "data.batch_size=8", "data.eval_batch_size=40"]  # 5 steps per epoch
TINY = [*TINY_MODEL["transformer"], *TINY_DATA, "trainer.enable_progress_bar=false"]


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


@pytest.fixture
def sft(tmp_path: Path) -> Callable[..., DictConfig]:
    """Return a function that composes SFT with a tiny model for one epoch."""

    def compose(*overrides: str) -> DictConfig:
        return compose_config(*SFT, *TINY, f"paths.root={tmp_path}", "trainer.max_epochs=1", *overrides)

    return compose


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "rlhf" / "sft"


def weights(path: Path) -> dict[str, Tensor]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return dict(content["weights"])


class Killed(Exception):
    """Stands for ``kill -9``: nothing is written after it."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which the next stage is killed when its training is complete, before its export."""

    def prepare() -> None:
        def export_result(*_: Any) -> None:
            monkeypatch.undo()
            raise Killed

        monkeypatch.setattr(run, "export_result", export_result)

    return prepare


# Starting over


def test_an_earlier_run_is_not_replaced(sft: Any, output: Path) -> None:
    """Nothing is written: neither the log nor the files of the run change."""
    run_stage(sft())
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(ConfigError) as error:
        run_stage(sft("seed=2"))
    assert str(error.value) == (
        f"stage=sft has been run before: {output}/sft_final.pt exists.\n"
        "  Set resume=true to continue that run, overwrite=true to start over, or run=<name> for another run."
    )
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.usefixtures("output")
def test_the_checkpoints_of_a_killed_run_are_not_replaced(sft: Any, kill: Any) -> None:
    kill()
    with pytest.raises(Killed):
        run_stage(sft())
    with pytest.raises(ConfigError, match=r"last\.ckpt exists\.\n  Set resume=true"):
        run_stage(sft())


def test_overwrite_starts_over(sft: Any, output: Path, kill: Any) -> None:
    """If the new run is killed, nothing of the earlier one is left that could be mistaken for it."""
    run_stage(sft())
    first = weights(output / "sft_final.pt")
    run_stage(sft("seed=2", "overwrite=true"))
    second = weights(output / "sft_final.pt")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    (output / "metrics.json").touch()
    kill()
    with pytest.raises(Killed):
        run_stage(sft("overwrite=true"))
    assert not (output / "sft_final.pt").exists()
    assert not (output / "metrics.json").exists()
    run_stage(sft("resume=true"))
    torch.testing.assert_close(weights(output / "sft_final.pt"), first, **EXACT)


def test_overwrite_deletes_numbered_checkpoints_and_the_folder(sft: Any, output: Path) -> None:
    """Those of the new run stay, and so does the checkpoint that it starts from."""
    numbered = ["callbacks.checkpoint.every_n_train_steps=1", "callbacks.checkpoint.save_top_k=-1"]
    run_stage(sft(*numbered, "trainer.max_steps=4", "save_hf=true"))
    names = {f"step{step}.ckpt" for step in (1, 2, 3, 4)}
    assert {path.name for path in (output / "checkpoints").glob("step*")} == names
    start = output / "checkpoints" / "step4.ckpt"
    run_stage(sft(*numbered, "trainer.max_steps=1", "overwrite=true", f"stage.policy={start}"))
    assert {path.name for path in (output / "checkpoints").glob("step*")} == {"step1.ckpt", "step4.ckpt"}
    assert torch.load(output / "checkpoints" / "step1.ckpt", weights_only=True)["global_step"] == 1
    assert not (output / "hf").exists()


def test_resume_and_overwrite_exclude_each_other(sft: Any) -> None:
    with pytest.raises(ConfigError, match=r"^resume continues a run, and overwrite=true starts over\."):
        run_stage(sft("resume=true", "overwrite=true"))


@pytest.mark.parametrize("override", ["check=only", "trainer.fast_dev_run=true"])
def test_commands_without_a_result_need_no_overwrite(sft: Any, output: Path, override: str) -> None:
    run_stage(sft())
    before = (output / "sft_final.pt").stat().st_mtime_ns
    run_stage(sft(override))
    assert (output / "sft_final.pt").stat().st_mtime_ns == before


# Resuming


def test_resuming_requires_a_checkpoint(sft: Any) -> None:
    with pytest.raises(ConfigError, match=r"resume=true requires a checkpoint, but there is no .*last\.ckpt"):
        run_stage(sft("resume=true"))


def test_a_finished_stage_stays_as_it_is(sft: Any, output: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The metric that it was finished with is returned, for a sweep."""
    monitored = run_stage(sft())
    before = (output / "sft_final.pt").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, "rlhf"):
        assert run_stage(sft("resume=true")) == monitored
    assert math.isfinite(monitored)
    assert f"stage=sft is finished: {output}/sft_final.pt stays as it is." in caplog.text
    assert (output / "sft_final.pt").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"stage\.eps was .* and is 0\.1\.\n .*, or keep the result as it is: "):
        run_stage(sft("resume=true", "stage.eps=0.1"))
    run_stage(sft("resume=force", "stage.eps=0.1"))
    assert "is 0.1, which has no effect because the stage is finished. To apply it, start over: " in caplog.text
    assert (output / "sft_final.pt").stat().st_mtime_ns == before


@pytest.fixture
def dpo(sft: Any, tmp_path: Path) -> Callable[..., DictConfig]:
    """Return a function that composes DPO with the SFT model of the run for one step."""
    run_stage(sft())

    def compose(*overrides: str) -> DictConfig:
        own = ["stage=dpo", "stage.samples=0", "trainer.max_steps=1", "trainer.limit_val_batches=1"]
        return compose_config(*own, *TINY, f"paths.root={tmp_path}", *overrides)

    return compose


def test_an_export_that_was_interrupted_is_completed(dpo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The final model of the run is that of an earlier stage, and ``hf/`` is missing. Both are written once."""

    def make_final_model(*_: Any) -> None:
        raise Killed

    folder, final = tmp_path / "rlhf" / "dpo" / "hf", tmp_path / "rlhf" / "final_rl_model.pt"
    final.write_text("an earlier result")
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.artifacts.make_final_model", make_final_model)
        with pytest.raises(Killed):
            run_stage(dpo("save_hf=true"))
    run_stage(dpo("resume=true", "save_hf=true"))
    assert Export(str(final)).provenance["stage"] == "dpo"
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    before = {path: path.stat().st_mtime_ns for path in (final, *folder.iterdir())}
    run_stage(dpo("resume=true", "save_hf=true"))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_later_final_model_stays_as_it_is(dpo: Any, tmp_path: Path) -> None:
    """It may be that of the last round of a pipeline."""
    run_stage(dpo())
    final = tmp_path / "rlhf" / "final_rl_model.pt"
    final.write_text("of round_2")
    run_stage(dpo("resume=true"))
    assert final.read_text() == "of round_2"


def test_a_finished_stage_is_extended(sft: Any, output: Path) -> None:
    run_stage(sft())
    run_stage(sft("resume=true", "trainer.max_epochs=2"))
    assert Export(str(output / "sft_final.pt")).provenance["step"] == 10


def test_a_stage_that_has_ended_within_an_epoch_is_extended(
    sft: Any, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The epoch has 5 steps. A limit below the steps of the checkpoint is reported."""
    run_stage(sft("trainer.max_steps=3"))
    run_stage(sft("trainer.max_steps=-1", "resume=true"))
    assert Export(str(output / "sft_final.pt")).provenance["step"] == 5
    assert "has no effect" not in caplog.text
    run_stage(sft("trainer.max_steps=2", "resume=true"))
    assert "trainer.max_steps=2 has no effect: the checkpoint has 5 optimizer steps already." in caplog.text


def test_a_changed_setting_takes_effect_with_force(sft: Any, output: Path, kill: Any) -> None:
    """The optimizer and the schedule take the new learning rate and weight decay instead of those in the checkpoint."""
    kill()
    with pytest.raises(Killed):
        run_stage(sft("stage.schedule=constant"))
    changed = ["stage.schedule=constant", "stage.learning_rate=0.01", "stage.weight_decay=0.5", "trainer.max_epochs=2"]
    with pytest.raises(ConfigError, match=r"stage\.learning_rate was .* and is 0\.01, stage\.weight_decay was"):
        run_stage(sft("resume=true", *changed))
    run_stage(sft("resume=force", *changed))
    groups = torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 0.5), (0.01, 0.0)]


# Corrupt checkpoints


def flip_a_bit(path: Path) -> None:
    """Invert a bit in the middle of the largest record."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("spoil", [flip_a_bit, truncate], ids=lambda function: str(function.__name__))
def test_a_corrupt_checkpoint_is_replaced_by_the_one_before(
    sft: Any, output: Path, kill: Any, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
) -> None:
    """The resumed run ends with the weights of the uninterrupted one."""
    every_step = "callbacks.checkpoint.every_n_minutes=0"
    run_stage(sft(every_step))
    expected = weights(output / "sft_final.pt")
    kill()
    with pytest.raises(Killed):
        run_stage(sft(every_step, "overwrite=true"))
    last, previous = (output / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    steps = [torch.load(path, weights_only=True)["global_step"] for path in (previous, last)]
    assert steps == [4, 5]
    spoil(last)
    run_stage(sft("resume=true"))
    assert f"{last} is corrupt: " in caplog.text
    torch.testing.assert_close(weights(output / "sft_final.pt"), expected, **EXACT)
    assert damage(last) is None


def test_a_run_without_an_intact_checkpoint_is_an_error(sft: Any, output: Path, kill: Any) -> None:
    kill()
    with pytest.raises(Killed):
        run_stage(sft())
    for path in (output / "checkpoints").iterdir():
        truncate(path)
    with pytest.raises(DataError, match=r"last\.ckpt .*cannot be read: .*\.\n  Start over: overwrite=true"):
        run_stage(sft("resume=true"))


# The lock


def test_a_second_process_is_refused(sft: Any, output: Path) -> None:
    """The lock is that of the running process, whatever an earlier process has left in the file."""
    output.mkdir(parents=True)
    (output / ".lock").write_text("process 1 on nowhere\n")
    with locked(output), pytest.raises(ConfigError, match=r"sft is in use by another process \(process \d+ on .+\)\."):
        run_stage(sft())
    run_stage(sft())


# The pipeline


def test_a_pipeline_continues_where_it_was_interrupted(tmp_path: Path, kill: Any) -> None:
    """Finished steps are skipped, the interrupted one is resumed, and the others start."""
    steps = ["pipeline.steps=[sft,reward,dpo]", "trainer.max_epochs=1", "data.batch_size=8", "data.max_rows=16"]
    command = [*TINY, *steps, "pipeline.report=false", "pipeline.overrides.sft=['stage.samples=0']"]
    directories = [tmp_path / "whole" / "rlhf", tmp_path / "killed" / "rlhf"]
    with hydra_command(*command, f"paths.root={tmp_path}/whole") as cfg:
        run_pipeline(cfg)
    with hydra_command(*command, f"paths.root={tmp_path}/killed", "pipeline.steps=[sft]") as cfg:
        run_pipeline(cfg)
    finished = (directories[1] / "sft" / "sft_final.pt").stat().st_mtime_ns
    kill()
    with hydra_command(*command, f"paths.root={tmp_path}/killed", "resume=true") as cfg, pytest.raises(Killed):
        run_pipeline(cfg)
    with hydra_command(*command, f"paths.root={tmp_path}/killed", "resume=true") as cfg:
        run_pipeline(cfg)
    assert (directories[1] / "sft" / "sft_final.pt").stat().st_mtime_ns == finished
    for name in ("sft/sft_final.pt", "reward/reward_model_final.pt", "dpo/dpo_final.pt"):
        torch.testing.assert_close(*(weights(directory / name) for directory in directories), **EXACT)


def test_a_pipeline_that_starts_over_continues_where_it_was_interrupted(tmp_path: Path, kill: Any) -> None:
    """The results of the later steps, which the earlier pipeline has left, are not those of this pipeline."""
    steps = ["pipeline.steps=[sft,reward]", "trainer.max_steps=2", "trainer.limit_val_batches=0"]
    command = [
        *TINY,
        *steps,
        "pipeline.report=false",
        "pipeline.overrides.sft=['stage.samples=0']",
        f"paths.root={tmp_path}",
    ]
    with hydra_command(*command) as cfg:
        run_pipeline(cfg)
    final = tmp_path / "rlhf" / "reward" / "reward_model_final.pt"
    earlier, other = weights(final), [*command, "seed=5"]
    kill()
    with hydra_command(*other, "overwrite=true") as cfg, pytest.raises(Killed):
        run_pipeline(cfg)
    assert not final.exists()
    assert not (final.parent / "reward.log").exists()
    with hydra_command(*other, "resume=true") as cfg:
        run_pipeline(cfg)
    assert any(not torch.equal(weight, earlier[name]) for name, weight in weights(final).items())


def test_a_pipeline_that_starts_over_keeps_the_inputs_that_it_does_not_make(tmp_path: Path) -> None:
    """The policy of DPO is made again; the reward model of PPO is not, although a later step trains another one."""
    root, directory = f"paths.root={tmp_path}", tmp_path / "rlhf"
    made, given = directory / "sft" / "sft_final.pt", directory / "reward" / "reward_model_final.pt"
    first = compose_config("stage=sft", root)
    later = [
        compose_config("stage=dpo", root, f"stage.policy={made}"),
        compose_config("stage=ppo", root, f"stage.reward_model={given}"),
        compose_config("stage=reward", root),
    ]
    for path in (made, given):
        path.parent.mkdir(parents=True)
        path.touch()
    remove_earlier(first, made.parent, later)
    assert not made.exists()
    assert given.exists()


def test_a_pipeline_that_would_replace_a_result_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of the last step is found before the first step starts."""
    monkeypatch.setattr("rlhf.pipeline.run_stage", lambda *_: pytest.fail("a step has started"))
    final = tmp_path / "rlhf" / "dpo" / "dpo_final.pt"
    final.parent.mkdir(parents=True)
    final.touch()
    with hydra_command(f"paths.root={tmp_path}") as cfg, pytest.raises(ConfigError, match=r"^stage=dpo has been run"):
        run_pipeline(cfg)
