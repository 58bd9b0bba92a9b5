"""The table of a sweep, and the sweeps of real commands."""

import json
import os
import time
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from harness import TINY_DATA, TINY_MODEL, run_train
from rlhf.files import write_json
from rlhf.sweep.job import Job
from rlhf.sweep.table import commands, content, failures, read_jobs, sweep_table, swept_keys


@pytest.fixture(scope="session")
def architecture() -> str:
    return "transformer"


def write_jobs(folder: Path, metric: str) -> None:
    values: list[tuple[str, float | None, str]] = [
        ("a", 0.2, ""),
        ("b", 0.9, ""),
        ("c", None, "stage.beta must be\x1b[2J positive."),
        ("d", None, ""),
    ]
    for name, value, error in values:
        job = Job([f"loss={name}", "data.max_rows=9", "stage.betas=[0.9,0.99]"], metric, value, 61.4, error, 2)
        write_json(folder / f"loss={name}" / "job.json", asdict(job))


@pytest.mark.parametrize(("metric", "order"), [("val/loss", "abdc"), ("val/rewards/accuracies", "badc")])
def test_the_best_job_comes_first(tmp_path: Path, metric: str, order: str) -> None:
    """A loss is better when it is lower. Jobs without a metric come after those with one, and failed ones last."""
    write_jobs(tmp_path, metric)
    jobs = read_jobs(tmp_path)
    assert [path.name for path in jobs] == [f"loss={name}" for name in order]
    assert [entry["overrides"][0] for entry in content(tmp_path, jobs)["jobs"]] == [f"loss={name}" for name in order]
    assert swept_keys(jobs) == {"loss": list(order)}
    table = sweep_table(jobs)
    columns = {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
    shown = {"a": "0.2000", "b": "0.9000", "c": "failed", "d": "none"}
    assert columns == {"loss": list(order), metric: [shown[name] for name in order], "seconds": ["61"] * 4}
    assert failures(jobs) == ["loss=c: stage.beta must be\\x1b[2J positive."]
    Console(width=20, quiet=True).print(table)


def test_keys_in_the_table_are_text(tmp_path: Path) -> None:
    """Brackets are not the markup of rich, and control characters are escaped."""
    for value in "ab":
        write_json(tmp_path / value / "job.json", asdict(Job([f"[/b]={value}"], "x\x1b[a1]", 1.0)))
    console = Console(width=200, file=StringIO())
    console.print(sweep_table(read_jobs(tmp_path)))
    assert "[/b]" in console.file.getvalue()
    assert "x\\x1b[a1]" in console.file.getvalue()


def test_jobs_of_an_earlier_sweep_are_left_out(tmp_path: Path) -> None:
    write_jobs(tmp_path, "val/loss")
    old = tmp_path / "loss=a" / "job.json"
    os.utime(old, (time.time() - 100,) * 2)
    assert [path.name for path in read_jobs(tmp_path, time.time() - 50)] == ["loss=b", "loss=d", "loss=c"]


def test_jobs_of_other_runs_are_listed(tmp_path: Path) -> None:
    """A sweep over ``run`` has a directory in each run, and this process knows of the jobs that it has run."""
    base, other = tmp_path / "rlhf" / "sweeps" / "dpo", tmp_path / "b" / "sweeps" / "dpo" / "run=b"
    write_jobs(base, "val/loss")
    ended = {other: Job(["run=b"], "val/loss", 0.1), base / "loss=a": Job(["loss=a"], "val/loss", 0.2)}
    jobs = read_jobs(base, ended=ended)
    assert [path.name for path in jobs] == ["run=b", "loss=a", "loss=b", "loss=d", "loss=c"]
    assert [entry["directory"] for entry in content(base, jobs)["jobs"]][:2] == [
        "../../../b/sweeps/dpo/run=b",
        "loss=a",
    ]


def test_the_commands_open_the_policy(tmp_path: Path) -> None:
    best = tmp_path / "loss=ipo"
    best.mkdir()
    jobs = {best: Job(["loss=ipo"], "val/loss", 0.1)}
    assert commands(jobs) == [f"tensorboard --logdir {tmp_path}"]
    (best / "dpo_final.pt").touch()
    code = f'from rlhf import load_model; model, tokenizer, device = load_model("{best / "dpo_final.pt"}")'
    assert commands(jobs)[0] == f"python -c '{code}'"


def test_the_commands_show_the_curves_of_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of a sweep over ``run`` have no directory in common but that of all runs."""
    jobs = {Path("outputs") / run / "sweeps" / "sft" / f"run={run}": Job([f"run={run}"], "", None) for run in "ab"}
    monkeypatch.chdir(tmp_path)
    assert commands(jobs) == ["tensorboard --logdir outputs"]
    assert str(sweep_table(jobs).title).startswith("Jobs of the sweep in outputs,")


def test_drawn_numbers_are_rounded(tmp_path: Path) -> None:
    """Optuna draws numbers of 16 digits. What was typed stays as it is."""
    for number, beta in enumerate(("0.43557259109182184", "4.252744858000656e-05", "0.1", "ipo")):
        write_json(tmp_path / str(number) / "job.json", asdict(Job([f"stage.beta={beta}"], "val/loss", number)))
    (column, *_) = sweep_table(read_jobs(tmp_path)).columns
    assert [str(cell) for cell in column.cells] == ["0.4356", "4.253e-05", "0.1", "ipo"]


@pytest.mark.slow
def test_a_failing_job_does_not_end_the_sweep(repo: Path, tmp_path: Path) -> None:
    """Three learning rates, of which one is invalid. The exit code is that of a mistake in the configuration."""
    command = ["-m", "stage=sft", *TINY_MODEL["transformer"], *TINY_DATA, "trainer.max_steps=2", "stage.samples=0"]
    rates = "stage.learning_rate=1e-3,-1,1e-4"
    done = run_train(repo, tmp_path, *command, rates, check=False)
    assert done.returncode == 2, done.stderr[-3000:]
    sweep = json.loads((tmp_path / "rlhf" / "sweeps" / "sft" / "sweep.json").read_text())["jobs"]
    assert [job["value"] is None for job in sweep] == [False, False, True]
    assert sweep[0]["value"] <= sweep[1]["value"]
    assert sweep[0]["metric"] == "val/loss"
    assert "stage.learning_rate must be a number above 0, got -1" in sweep[2]["error"]
    assert "the best one first" in " ".join(done.stdout.split())  # A long directory wraps the title.
    assert "stage.learning_rate must be a number above 0, got -1" in done.stderr
    again = run_train(repo, tmp_path, *command, "stage.learning_rate=1e-3,1e-4", "resume=true")
    assert again.stdout.count("is finished") == 2
