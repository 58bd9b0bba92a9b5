"""``stage=report``: every figure equals its source, every text is only text, and damaged runs have a report as well."""

import base64
import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from contract.configs import compose_config, hydra_command
from report.conftest import CURVES, EVALUATION, HOSTILE, REWARD, TEXTS, damage, write_events, write_stage
from report.page_reader import Page, read_page
from rlhf.errors import ConfigError
from rlhf.report import write_report, write_run_report


def report_of(run: Path) -> Page:
    write_run_report(run, run.name, run / "report.html")
    return read_page(run / "report.html")


def command(run: Path, **keys: Any) -> Path:
    """Run the command for a run, and return the file of ``output``."""
    target = run.parent / "written.html"
    cfg = compose_config("stage=report", f"paths.root={run.parent}", f"run={run.name}")
    assert write_report(cfg, output=str(target), **keys) == 0
    return target


def test_evaluation_equals_metrics_json(finished_run: Path) -> None:
    """Means by policy and metric, win rates by policy, opponent and scorer, and the figures at the top."""
    page = report_of(finished_run)
    models = EVALUATION["models"]
    columns = ("gold", "reward", "kl_to_sft")
    assert page.values("evaluation-metrics") == {
        name: [metrics[key]["mean"] if key in metrics else None for key in columns] for name, metrics in models.items()
    }
    rates = {tuple(text for text, _ in row[:3]): row[3][1] for row in page.tables["win-rates"]}
    assert rates == {
        ("ppo", "sft", "gold score"): 0.85667,
        ("ppo", "sft", "reward model"): 0.88501,
        ("target", "sft", "gold score"): 0.32333,
    }
    shown = [own["data-value"] for _, own in page.elements if own.get("class") == "figure" and "data-value" in own]
    assert shown == ["0.85667", "0.8903", "244.0", "1.0"]  # win rate, accuracy, 4 stages of 61 s, one alert
    assert "0.826 to 0.877" in page.text  # 0.85667 - 0.0303 and 0.85667 + 0.0207


def test_reward_model_equals_metrics_json(finished_run: Path) -> None:
    page = report_of(finished_run)
    values = page.values("rm-reward")
    assert values["accuracy"] == [REWARD["accuracy"]]
    assert values["expected calibration error"] == [REWARD["calibration_error"]]
    assert values["accuracy where the chosen response is longer"] == [REWARD["longer_chosen"]["accuracy"]]
    assert values["correlation of score and length, Pearson"] == [REWARD["length_correlation"]["pearson"]]
    assert "correlation of score and length, Spearman" not in values  # undefined
    (line,) = page.data["plots"]["rm-reward-calibration"]["lines"]
    assert (line["x"], line["y"]) == ([0.6123, 0.8345], [0.8211, 0.8622])
    (line,) = page.data["plots"]["rm-reward-length"]["lines"]
    assert (line["x"], line["y"]) == ([10.127], [-0.20825])


def test_curves_equal_the_event_files(finished_run: Path) -> None:
    """The values are exact in float32. Training and validation share a plot; a single value has none."""
    page = report_of(finished_run)
    plots = {name: plot["lines"] for name, plot in page.data["plots"].items() if name.startswith("curve-")}
    drawn = {
        name: {line["label"]: list(zip(line["x"], line["y"], strict=True)) for line in lines}
        for name, lines in plots.items()
    }
    assert drawn == {
        "curve-sft-train_2floss": {
            "training": [(1, 3.5), (2, 2.25), (3, 1.125)],
            "validation": [(3, 1.25)],
        },
        "curve-reward-train_2floss": {"training": [(1, 0.75), (2, 0.5)]},
        "curve-ppo-objective_2fscores": {
            "training": [(4, 0.5), (8, 1.5), (12, 2.5)],
            "validation": [(12, 2.125)],
        },
        "curve-ppo-objective_2fkl": {"training": [(4, 0.25), (8, 1.25), (12, 11.0)]},
    }
    last = {name: points[-1][1] for name, points in CURVES["ppo"].items() if not name.startswith("alerts/")}
    assert {name: values[0] for name, values in page.values("values-ppo").items()} == last


def test_reward_against_kl(finished_run: Path) -> None:
    """Training pairs both metrics of a step. Evaluated policies are points; the target has no KL divergence."""
    plots = report_of(finished_run).data["plots"]
    lines = {line["label"]: (line["x"], line["y"]) for line in plots["tradeoff-reward"]["lines"]}
    assert lines == {
        "ppo, training": ([0.25, 1.25, 11.0], [0.5, 1.5, 2.5]),
        "sft, evaluated": ([0.0], [0.89512]),
        "ppo, evaluated": ([1.52113], [2.23853]),
    }
    gold = {line["label"]: line["y"] for line in plots["tradeoff-gold"]["lines"]}
    assert gold == {"sft, evaluated": [0.53363], "ppo, evaluated": [0.76727]}


def test_a_tradeoff_plot_has_finite_points_of_the_baseline(finished_run: Path) -> None:
    """The KL divergence to another model is not that of the axis, and an overflow in training has no place on it."""
    path = finished_run / "evaluation" / "metrics.json"
    metrics = json.loads(path.read_text())
    entry = metrics["models"]["ppo"]
    metrics["models"]["ppo"] = {"kl_to_other": {"mean": 7.0, "low": 7.0, "high": 7.0}, **entry}
    path.write_text(json.dumps(metrics))
    scores = {"objective/kl": [(16, math.inf), (20, 12.0)], "objective/scores": [(16, 1.0), (20, 3.0)]}
    write_events(finished_run / "ppo" / "tensorboard" / "version_1", scores)
    lines = {line["label"]: line["x"] for line in report_of(finished_run).data["plots"]["tradeoff-reward"]["lines"]}
    assert lines["ppo, evaluated"] == [1.52113]
    assert lines["ppo, training"] == [0.25, 1.25, 11.0, 12.0]


def test_an_evaluation_that_was_interrupted_does_not_hide_the_last_complete_one(finished_run: Path) -> None:
    later = finished_run / "round_2_evaluation"
    shutil.copytree(finished_run / "evaluation", later)
    (later / "metrics.json").unlink()
    assert report_of(finished_run).values("evaluation-metrics").keys() == EVALUATION["models"].keys()


def test_alerts_are_listed_with_their_step_and_marked(finished_run: Path) -> None:
    page = report_of(finished_run)
    assert "kl at step 12: objective/kl is 11. Raise stage.kl_coef." in page.text
    marks = [own for tag, own in page.elements if tag == "path" and own.get("stroke") == "var(--alert)"]
    assert len(marks) == 1


def test_texts_are_shown_as_text_and_run_nothing(finished_run: Path) -> None:
    """A script runs only if its hash is in the policy, and there is one such script: the page's own."""
    page = report_of(finished_run)
    raw = (finished_run / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in raw
    assert chr(0x2028) not in raw
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 3
    assert "img" not in tags
    assert not any(name.startswith("on") for _, own in page.elements for name in own)
    assert not any(name in own for tag, own in page.elements for name in ("src", "style") if tag != "svg")
    links = {str(own["href"]) for _, own in page.elements if "href" in own}
    assert all(link.startswith("#") for link in links)
    (policy,) = [own["content"] for _, own in page.elements if own.get("http-equiv") == "Content-Security-Policy"]
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in str(policy)
    assert "default-src 'none'" in str(policy)
    assert "unsafe" not in str(policy)
    assert HOSTILE in page.text  # of the configuration and of a warning, as text


def test_responses_are_complete(finished_run: Path) -> None:
    """Segments of a response, without those that only the baseline has, are its text."""
    samples = report_of(finished_run).data["samples"]
    assert samples["models"] == ["sft", "ppo"]
    assert samples["metrics"] == ["reward", "gold"]
    shown = [
        "".join(text for kind, text in row["responses"]["ppo"]["segments"] if kind != 2) for row in samples["rows"]
    ]
    assert shown == list(TEXTS.values())
    assert [row["responses"]["ppo"]["metrics"]["reward"] for row in samples["rows"]] == [n + 0.125 for n in range(6)]


def test_the_configuration_section(finished_run: Path) -> None:
    with open(finished_run / "ppo" / ".hydra" / "overrides.yaml", "a") as file:
        file.write("- resume=true\n")  # the last start of an interrupted run
    page = report_of(finished_run)
    assert "python train.py stage=ppo run=mine stage.kl_coef=0.1" in page.text
    assert "resume=true" not in page.text
    assert page.tables["data"][0][0][0] == "sft, reward, ppo"
    assert [text for text, _ in page.tables["data"][1][1:]] == ["input policy", "o/sft/sft_final.pt", "cd657555"]
    assert [row[2][0] for row in page.tables["versions"]][:1] == ["2.13.0"]


def test_a_damaged_run_has_a_report_that_lists_the_damage(finished_run: Path) -> None:
    for name in ("evaluation/metrics.json", "reward/metrics.json", "evaluation/samples.jsonl", "ppo/ppo_final.pt"):
        damage(finished_run / name)
    (finished_run / "sft" / ".hydra" / "config.yaml").write_text("[")
    (events,) = (finished_run / "ppo" / "tensorboard" / "version_0").iterdir()
    events.write_bytes(b"no events at all" * 9)
    page = report_of(finished_run)
    for part in (
        "evaluation/metrics.json is damaged",
        "reward/metrics.json is damaged",
        "samples.jsonl: 1 lines are damaged",
        "ppo_final.pt is damaged",
        "The configuration cannot be read",
        "version_0 contain no metric",
        "There is no complete evaluation",
    ):
        assert part in page.text
    assert [row[0][0] for row in page.tables["pipeline-stages"]] == ["sft", "reward", "ppo", "evaluation"]


def test_a_truncated_event_file_shows_what_is_left(finished_run: Path) -> None:
    (events,) = (finished_run / "ppo" / "tensorboard" / "version_0").iterdir()
    damage(events)
    lines = report_of(finished_run).data["plots"]["curve-ppo-objective_2fscores"]["lines"]
    assert [line["y"] for line in lines if line["label"] == "training"] == [[0.5, 1.5, 2.5]]


@pytest.mark.parametrize("content", ["[]", '{"models": []}', '{"models": {"ppo": {"gold": 3, "win_rate_vs_sft": 1}}}'])
def test_metrics_of_another_form_are_left_out(finished_run: Path, content: str) -> None:
    (finished_run / "evaluation" / "metrics.json").write_text(content)
    (finished_run / "reward" / "metrics.json").write_text('{"by_confidence": [{"confidence": "x"}], "accuracy": []}')
    assert "Evaluation" in report_of(finished_run).text


def test_a_run_that_has_only_started(tmp_path: Path) -> None:
    run = tmp_path / "started"
    (write_stage(run, "sft") / "sft_final.pt").unlink()
    page = report_of(run)
    assert "sft has not finished: no checkpoint." in page.text
    assert "There is no evaluation" in page.text
    assert "There is no reward model" in page.text


def test_rounds_follow_the_other_stages(finished_run: Path) -> None:
    """They are ordered by their number, and the evaluation of the last one is shown."""
    for name in ("round_10", "round_2"):
        evaluation = write_stage(finished_run / name, "evaluate")
        (evaluation / "metrics.json").write_text(json.dumps({"prompts": 1, "models": {name: {"gold": {"mean": 0.5}}}}))
    page = report_of(finished_run)
    names = [row[0][0] for row in page.tables["pipeline-stages"]]
    assert names == ["sft", "reward", "ppo", "evaluation", "round_2/evaluate", "round_10/evaluate"]
    assert page.values("evaluation-metrics") == {"round_10": [0.5]}


@pytest.mark.parametrize("directory", ["my run", "sweeps/pipeline/loss=ipo,stage.beta=0.1"])
def test_the_command_for_an_evaluation_is_that_of_the_directory(tmp_path: Path, directory: str) -> None:
    """Whatever the name of the report is, as that of the pipeline for a job of a sweep."""
    write_stage(tmp_path / directory, "dpo")
    write_run_report(tmp_path / directory, "title", tmp_path / "report.html")
    (command,) = re.findall(r"To make one: (.*)", read_page(tmp_path / "report.html").text)
    program, *overrides = shlex.split(command)[1:]
    with hydra_command(*overrides) as cfg:
        assert (program, cfg.stage_name, cfg.paths.run) == ("train.py", "evaluate", str(tmp_path / directory))


def test_a_job_over_one_stage_has_no_command_for_an_evaluation(tmp_path: Path) -> None:
    """It is not a run, so ``stage=evaluate`` finds no policy in its directory."""
    text = report_of(write_stage(tmp_path, "dpo", "stage.beta=0.1")).text
    assert "There is no complete evaluation." in text
    assert "To make one" not in text


def test_the_command_for_a_run_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        command(tmp_path / "none yet" / "nope")
    overrides = shlex.split(str(error.value).partition("\n  Run python train.py ")[2])
    with hydra_command(*overrides) as cfg:
        assert cfg.paths.run == str(tmp_path / "none yet" / "nope")


def test_runs_are_compared(finished_run: Path) -> None:
    """A row per run with the last value of validation, one line per run in each plot, and the settings that differ."""
    other = finished_run.parent / "other"
    directory = write_stage(other, "ppo")
    config = directory / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("kl_coef: 0.1", "kl_coef: 0.2"))
    page = read_page(command(finished_run, runs=["mine", "other"]))
    assert page.values("metrics-ppo") == {"mine": [2.125], "other": [2.125]}
    assert [line["label"] for line in page.data["plots"]["compare-ppo-objective_2fkl"]["lines"]] == ["mine", "other"]
    assert [[text for text, _ in row] for row in page.tables["settings-ppo"]] == [["stage.kl_coef", "0.1", "0.2"]]
    rows = {(row[0][0], row[1][0]): row[2][1] for row in page.tables["evaluation-metrics"]}
    assert rows == {("mine", "sft"): None, ("mine", "ppo"): 0.85667, ("mine", "target"): 0.32333}


def test_jobs_of_a_sweep_are_compared(finished_run: Path) -> None:
    """Their names are shortened to the overrides that differ. A directory is accepted in place of the stage."""
    sweep = finished_run / "sweeps" / "ppo"
    for coefficient in ("0.1", "0.2"):
        write_stage(sweep, "ppo", f"data.max_rows=9,stage.kl_coef={coefficient}")
    page = read_page(command(finished_run, sweep="ppo"))
    assert [row[0][0] for row in page.tables["runs"]] == ["stage.kl_coef=0.1", "stage.kl_coef=0.2"]
    assert list(page.values("metrics-ppo")) == ["stage.kl_coef=0.1", "stage.kl_coef=0.2"]
    assert read_page(command(finished_run, sweep=str(sweep))).tables["runs"] == page.tables["runs"]


@pytest.mark.parametrize(
    ("run", "keys", "message"),
    [
        ("nowhere", {}, r"^run=nowhere: there is no such run \(.*\)\. Runs in .*: mine\.\n  Choose one of these\.$"),
        ("mine", {"runs": ["mine", "a"]}, "^command.runs: there is no such run"),
        ("mine", {"runs": ["../mine", "mine"]}, "^run must be a plain name"),
        ("mine", {"runs": ["mine"]}, "^command.runs must name at least two runs"),
        ("mine", {"sweep": "dpo"}, "^command.sweep=dpo: there is no such sweep"),
        ("mine", {"runs": ["mine", "a"], "sweep": "dpo"}, "^command.runs and command.sweep exclude each other"),
    ],
)
def test_a_run_that_does_not_exist(finished_run: Path, run: str, keys: dict[str, Any], message: str) -> None:
    before = sorted(finished_run.parent.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        command(finished_run.parent / run, **keys)
    assert sorted(finished_run.parent.rglob("*")) == before


def test_the_command_writes_the_report_without_torch(repo: Path, finished_run: Path) -> None:
    root = finished_run.parent
    arguments = ["stage=report", "run=mine", f"paths.root={root}"]
    importtime = [sys.executable, "-X", "importtime", "train.py", *arguments]
    done = subprocess.run(importtime, cwd=repo, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "matplotlib" in imported
    assert imported.isdisjoint({"torch", "transformers", "lightning", "datasets"})
    assert (finished_run / "report.html").stat().st_size > 10_000
    assert not list(root.rglob("*.part"))


@pytest.mark.parametrize(
    ("name", "shown"), [("a\x1b<", r"a\x1b<"), ("\0", r"\x00"), ("\ud800", r"\ud800"), ("\ufffe", r"\ufffe")]
)
def test_names_of_models_may_contain_any_character(finished_run: Path, name: str, shown: str) -> None:
    """SVG cannot contain control characters, lone surrogates and U+FFFE, so a plot shows their escapes."""
    path = finished_run / "evaluation" / "metrics.json"
    path.write_text(json.dumps(EVALUATION).replace('"ppo"', json.dumps(name)))
    assert f"{shown}, gold score" in report_of(finished_run).text


def test_names_of_metrics_and_runs_are_text(tmp_path: Path) -> None:
    """Neither the markup of HTML nor that of matplotlib has an effect."""
    run = tmp_path / "$a_b$ <b>"
    directory = write_stage(run, "dpo", "<i>$x^$")
    (directory / "dpo.log").write_text("2026-01-01 00:00:00,000 INFO step=1 a<b=1\n")
    write_run_report(run, run.name, tmp_path / "r.html")
    raw = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<b>" not in raw
    assert "<i>" not in raw
    assert json.dumps("a<b") not in raw
    assert re.search(r"<h1>\$a_b\$ &lt;b&gt;</h1>", raw)
