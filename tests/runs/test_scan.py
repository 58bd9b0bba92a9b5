"""``stage=runs``: states, metrics and stale results, read from directories as stages leave them."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.export import save_result
from rlhf.files import write_json
from rlhf.lineage import model_digest
from rlhf.runs.checkpoints import checkpoint_step
from rlhf.runs.scan import StageSummary, scan_run
from rlhf.runs.table import age, scan_runs
from rlhf.stage import Result
from rlhf.stages import stages

CONFIG = "stage_name: {stage}\nmodel: {{_target_: rlhf.models.Mamba}}\nadapter: null\nother: ${{paths.run}}\n"
LOG = "2026-01-01 00:00:00,000 INFO step=7 train/loss=1.5 \n2026-01-01 00:00:01,000 INFO val/loss = 0.4030\n"
NEVER = "the file must not be executed"


def start(directory: Path, stage: str, *, log: str = LOG) -> Path:
    """Write what a stage writes when it starts: its configuration and its log."""
    (directory / ".hydra").mkdir(parents=True)
    (directory / ".hydra" / "config.yaml").write_text(CONFIG.format(stage=stage))
    (directory / f"{stage}.log").write_text(log)
    return directory


def finish(directory: Path, stage: str) -> Path:
    """Write the result of a stage, with a tensor in it."""
    path = directory / str(stages()[stage].final)
    torch.save({"weights": torch.zeros(2)}, path)
    return path


def save_checkpoint(path: Path, step: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"epoch": 0, "global_step": step, "state_dict": {"w": torch.zeros(2)}, "loops": {"global_step": 99}}, path
    )
    return path


def set_age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def only(run: Path) -> StageSummary:
    (summary,) = scan_run(run)
    return summary


@pytest.mark.parametrize("step", [0, 200, 70_000, 3_000_000])
def test_the_step_of_a_checkpoint_is_read_without_unpickling(tmp_path: Path, step: int) -> None:
    """Numbers of one, two and four bytes have different opcodes. The step is the first one of that name."""
    assert checkpoint_step(save_checkpoint(tmp_path / "last.ckpt", step)) == step
    assert checkpoint_step(save_checkpoint(tmp_path / "sharded" / "meta.pt", step).parent) == step


def test_a_pickle_that_calls_a_function_is_not_executed(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return pytest.fail, (NEVER,)

    path = tmp_path / "last.ckpt"
    torch.save({"first": Hostile(), "global_step": 3}, path)
    assert checkpoint_step(path) == 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"text"])
def test_a_damaged_checkpoint_has_no_step(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="is incomplete"):
        checkpoint_step(tmp_path / "last.ckpt")


def test_a_finished_stage_shows_its_monitored_metric(tmp_path: Path) -> None:
    directory = start(tmp_path / "sft", "sft")
    save_checkpoint(directory / "checkpoints" / "last.ckpt", 5)
    set_age(directory / "checkpoints" / "last.ckpt", 60)
    finish(directory, "sft")
    summary = only(tmp_path)
    assert (summary.name, summary.state, summary.metric, summary.base_model) == (
        "sft",
        "finished",
        "val/loss 0.4030",
        "mamba",
    )


def test_a_checkpoint_without_a_newer_result_was_killed(tmp_path: Path) -> None:
    """Without any result, and with one of an earlier training that was then continued."""
    directory = start(tmp_path / "ppo", "ppo")
    assert only(tmp_path).state == "no checkpoint"
    save_checkpoint(directory / "checkpoints" / "last.ckpt", 120)
    assert only(tmp_path).state == "killed at step 120"
    set_age(finish(directory, "ppo"), 60)
    assert only(tmp_path).state == "killed at step 120"


@pytest.mark.parametrize(("step", "state"), [(120, "finished"), (140, "killed at step 140")])
def test_a_copied_run_is_finished_if_its_result_has_the_last_step(
    tmp_path: Path, lm: Any, tokenizer: Any, step: int, state: str
) -> None:
    """The checkpoint has been copied after the result. A later step is that of a training that was continued."""
    result = start(tmp_path / "ppo", "ppo") / "ppo_final.pt"
    save_result(Result(lm, tokenizer), result, {"stage": "ppo", "step": 120})
    set_age(result, 60)
    save_checkpoint(tmp_path / "ppo" / "checkpoints" / "last.ckpt", step)
    assert only(tmp_path).state == state


def test_the_checkpoint_before_counts_where_the_newest_one_is_damaged(tmp_path: Path) -> None:
    directory = start(tmp_path / "ppo", "ppo")
    save_checkpoint(directory / "checkpoints" / "previous.ckpt", 80)
    (directory / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    assert only(tmp_path).state == "killed at step 80"
    (directory / "checkpoints" / "previous.ckpt").unlink()
    assert only(tmp_path).state == "unreadable"


def test_a_sharded_checkpoint_is_as_old_as_its_content(tmp_path: Path) -> None:
    """With ``trainer=fsdp``, ``last.ckpt`` is a directory; a change in it later does not make it newer."""
    directory = start(tmp_path / "sft", "sft")
    meta = save_checkpoint(directory / "checkpoints" / "last.ckpt" / "meta.pt", 9)
    assert only(tmp_path).state == "killed at step 9"
    set_age(meta, 60)
    finish(directory, "sft")
    assert only(tmp_path).state == "finished"


def test_a_locked_stage_is_running(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    directory = start(tmp_path / "sft", "sft")
    finish(directory, "sft")
    with open(directory / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert only(tmp_path).state == "running, step 7"
    assert only(tmp_path).state == "finished"


def test_metrics_of_evaluation_and_reward_model(tmp_path: Path) -> None:
    """Policies over the baseline by the gold score; neither the target nor the win rates over it are shown."""
    rate = {"gold": {"value": 0.86, "low": 0.8, "high": 0.9}, "reward": {"value": 0.5, "low": 0.4, "high": 0.6}}
    models = {
        "sft": {"win_rate_vs_target": rate},
        "ppo": {"win_rate_vs_sft": rate, "win_rate_vs_target": rate},
        "runs/variant/dpo_final.pt": {"win_rate_vs_sft": {"reward": rate["reward"]}},
        "target": {"win_rate_vs_sft": rate},
    }
    write_json(start(tmp_path / "evaluation", "evaluate") / "metrics.json", {"models": models})
    write_json(start(tmp_path / "reward", "reward") / "metrics.json", {"accuracy": 0.8899})
    finish(tmp_path / "reward", "reward")
    metrics = {summary.name: (summary.state, summary.metric) for summary in scan_run(tmp_path)}
    assert metrics == {
        "reward": ("finished", "accuracy 0.890"),
        "evaluation": ("finished", "gold wins vs sft: ppo 0.86; RM wins vs sft: variant 0.50"),
    }


def test_stages_and_variants_are_in_order_and_other_directories_are_left_out(tmp_path: Path) -> None:
    for name, stage in {"rloo": "grpo", "evaluation": "evaluate", "sft": "sft", "pipeline": "pipeline"}.items():
        start(tmp_path / name, stage)
    for name in ("ref_logprobs", "notes", "tensorboard"):
        (tmp_path / name).mkdir()
    assert [summary.name for summary in scan_run(tmp_path)] == ["sft", "rloo", "evaluation"]


@pytest.mark.parametrize(
    ("name", "content", "shown"),
    [
        ("sft_final.pt", "", {"state"}),
        (".hydra/config.yaml", "{: [", {"base_model"}),
        (".hydra/config.yaml", "[1, 2]", {"base_model"}),
        ("metrics.json", "{oops", {"metric"}),
        ("metrics.json", "3", {"metric"}),
        ("metrics.json", '{"models": {"a": {"win_rate_vs_sft": {"gold": 3}}}}', {"metric"}),
        ("metrics.json", '{"accuracy": "high"}', {"metric"}),
    ],
)
def test_damaged_and_foreign_files_are_unreadable(tmp_path: Path, name: str, content: str, shown: set[str]) -> None:
    """One damaged file makes one entry of the row unreadable."""
    directory = start(tmp_path / "sft", "sft")
    finish(directory, "sft")
    (directory / name).write_text(content)
    assert {
        entry for entry in ("state", "metric", "base_model") if getattr(only(tmp_path), entry) == "unreadable"
    } == shown


def test_a_result_of_a_replaced_input_is_stale(tmp_path: Path, lm: Any, tokenizer: Any) -> None:
    """SFT, then DPO from it. If SFT is trained again, the result of DPO is stale; if it is only copied, it is not."""
    sft, dpo = (start(tmp_path / stage, stage) / f"{stage}_final.pt" for stage in ("sft", "dpo"))
    save_result(Result(lm, tokenizer), sft, {"stage": "sft"})
    inputs = {"policy": [{"source": f"Export({sft})", "sha256": model_digest(sft)}]}
    save_result(Result(lm, tokenizer), dpo, {"stage": "dpo", "inputs": inputs})
    set_age(dpo, 60)  # The file of the input is newer.
    assert [summary.state for summary in scan_run(tmp_path)] == ["finished", "finished"]
    next(lm.parameters()).data += 1
    save_result(Result(lm, tokenizer), sft, {"stage": "sft"})
    assert [summary.state for summary in scan_run(tmp_path)] == ["finished", "finished; stale, sft was trained again"]


def test_every_stage_after_a_replaced_reward_model_is_stale(tmp_path: Path, lm: Any, tokenizer: Any) -> None:
    """A reward model, PPO with it, and an evaluation of PPO. Both were made before the reward model was replaced."""
    reward, ppo = (start(tmp_path / name, name) / str(stages()[name].final) for name in ("reward", "ppo"))
    save_result(Result(lm, tokenizer), reward, {"stage": "reward"})
    inputs = {"reward_model": [{"source": f"Export({reward})", "sha256": model_digest(reward)}]}
    save_result(Result(lm, tokenizer), ppo, {"stage": "ppo", "inputs": inputs})
    next(lm.parameters()).data += 1
    save_result(Result(lm, tokenizer), reward, {"stage": "reward"})
    set_age(ppo, 60)
    evaluation = start(tmp_path / "evaluation", "evaluate")
    write_json(evaluation / "metrics.json", {"models": {"sft": {}, "ppo": {}}})
    set_age(evaluation / "metrics.json", 120)
    assert [(summary.name, summary.state) for summary in scan_run(tmp_path)] == [
        ("reward", "finished"),
        ("ppo", "finished; stale, reward was trained again"),
        ("evaluation", "finished; stale, ppo was trained again"),
    ]


def test_rounds_follow_the_stages_of_a_run(tmp_path: Path) -> None:
    """In the order of their numbers. A directory of another name is no round."""
    for name in ("sft", "round_10/dpo", "round_2/dpo", "round_2/collect", "round_x/dpo"):
        start(tmp_path / name, name.rpartition("/")[2])
    assert [summary.name for summary in scan_run(tmp_path)] == ["sft", "round_2/dpo", "round_2/collect", "round_10/dpo"]


def test_runs_are_listed_by_their_last_change(tmp_path: Path) -> None:
    """Jobs of a sweep are listed if they are asked for. A job of one stage is itself its directory."""
    start(tmp_path / "old" / "sft", "sft")
    start(tmp_path / "old" / "sweeps" / "dpo" / "beta=1", "dpo")
    start(tmp_path / "old" / "sweeps" / "pipeline" / "seed=1" / "ppo", "ppo")
    for path in tmp_path.rglob("*"):
        set_age(path, 1000)
    start(tmp_path / "new" / "sft", "sft")
    (tmp_path / "foreign" / "folder").mkdir(parents=True)
    assert list(scan_runs(tmp_path)) == ["new", "old"]
    found = scan_runs(tmp_path, sweeps=True)
    assert {name: [summary.name for summary in summaries] for name, summaries in found.items()} == {
        "new": ["sft"],
        "old": ["sft"],
        "old/sweeps/dpo/beta=1": ["beta=1"],
        "old/sweeps/pipeline/seed=1": ["ppo"],
    }


def test_ages_are_shown_in_their_largest_unit() -> None:
    assert [age(seconds) for seconds in (-1, 59, 60, 7199, 7200, 86400 * 3)] == [
        "0 s",
        "59 s",
        "1 min",
        "1 h",
        "2 h",
        "3 d",
    ]
