"""The content of the report of one run."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rlhf.report.curves import stage_curves
from rlhf.report.evaluation import (
    baseline_of,
    headline_rates,
    policy_colors,
    summarize_evaluation,
    tradeoff_plots,
)
from rlhf.report.events import is_finite
from rlhf.report.records import FileSize, RunRecord, StageRecord
from rlhf.report.reward_model import summarize_reward_model
from rlhf.report.samples import Samples, read_samples
from rlhf.report.settings import commands, configurations, data_table, version_table
from rlhf.report.tables import Cell, Table, code, duration, number, size, text
from rlhf.run_names import command_in_run
from rlhf.runs.scan import EVALUATION

NO_BREAK = chr(0xA0)
# Identifier and title of each section.
SECTIONS = (
    ("pipeline", "Pipeline"),
    ("curves", "Training curves"),
    ("tradeoff", "Reward against KL"),
    ("win-rates-section", "Evaluation"),
    ("reward-model", "Reward model"),
    ("responses", "Responses"),
    ("reproduce", "Configuration"),
)


@dataclass(frozen=True)
class Headline:
    """One of the figures at the top: what it is, the figure, and a detail such as an interval."""

    label: str
    cell: Cell


def run_content(run: RunRecord, max_prompts: int) -> dict[str, Any]:
    """Return what the template of a run shows.

    Args:
        run: The run.
        max_prompts: Largest number of prompts whose responses are shown.
    """
    colors = policy_colors(run)
    evaluation = run.evaluation
    has_metrics = evaluation is not None and bool(evaluation.metrics)
    samples = Samples()
    if evaluation is not None:
        samples = read_samples(evaluation.path / "samples.jsonl", baseline_of(evaluation), max_prompts)
    curves = [stage_curves(record) for record in run.stages if record.stage != "evaluate" and record.curves]
    tradeoffs = tradeoff_plots(run, colors)
    reward_models = [summarize_reward_model(record) for record in run.of_stage("reward") if record.metrics]
    drawn = [plot for stage in curves for plot in (*stage.shown, *stage.folded)]
    drawn += [*tradeoffs, *(plot for model in reward_models for plot in model.plots)]
    return {
        "title": run.name,
        "sections": SECTIONS,
        "hover": {plot.id: plot.hover for plot in drawn},
        "problems": [*run.problems, *samples.problems],
        "headlines": headlines(run),
        "stages": stage_table(run, colors),
        "files": file_tables(run),
        "warnings": {record.name: record.log.warnings for record in run.stages if record.log.warnings},
        "curves": curves,
        "tradeoffs": tradeoffs,
        "evaluate": "" if run.is_one_stage else command_in_run(run.path, "stage=evaluate"),
        "evaluation": summarize_evaluation(evaluation, colors) if has_metrics and evaluation is not None else None,
        "reward_models": reward_models,
        "samples": samples,
        "sample_data": sample_data(samples, colors),
        "configurations": configurations(run),
        "commands": commands(run),
        "data": data_table(run),
        "versions": version_table(run),
    }


def headlines(run: RunRecord) -> list[Headline]:
    """Return the figures at the top of the report."""
    found = []
    if run.evaluation is not None:
        for name, against, rate in headline_rates(run.evaluation):
            found.append(Headline(f"{name} wins against {against}", rate))
    for record in run.of_stage("reward"):
        if is_finite(record.metrics.get("accuracy")):
            error = record.metrics.get("calibration_error")
            detail = f"calibration error {number(error).text}" if is_finite(error) else ""
            found.append(Headline("accuracy of the reward model", number(record.metrics["accuracy"], detail)))
    times = [record.log.seconds for record in run.stages if record.log.seconds is not None]
    if times:
        detail = f"{len(times)} stages" if len(times) > 1 else "one stage"
        found.append(Headline("total time", Cell(duration(sum(times)), sum(times), detail)))
    fired = [alert for record in run.stages for alert in record.alerts]
    names = ", ".join(dict.fromkeys(alert.name for alert in fired))
    found.append(Headline("alerts", Cell(str(len(fired)), float(len(fired)), names or "none has fired")))
    return found


def stage_table(run: RunRecord, colors: dict[str, int]) -> Table:
    """Return the table of all stages: state, main metric, time and files."""
    rows = [
        [
            text(record.name, color=colors.get(record.name)),
            Cell(
                record.state,
                detail="" if record.name.rpartition("/")[2] in (record.stage, EVALUATION) else f"stage={record.stage}",
            ),
            text(record.metric),
            number(_last_step(record)),
            Cell(duration(record.log.seconds), record.log.seconds),
            text((record.log.started or _time(record.modified)).replace(" ", NO_BREAK)),
            _total_size(record.files),
        ]
        for record in run.stages
    ]
    columns = ["stage", "state", "main metric", "steps", "time", "started", "size"]
    return Table(columns, rows, "pipeline-stages")


def file_tables(run: RunRecord) -> Table:
    """Return the table of all files."""
    rows = [[text(record.name), code(file.name), size(file.size)] for record in run.stages for file in record.files]
    rows += [[text("result"), code(file.name), size(file.size)] for file in run.files]
    return Table(["stage", "file", "size"], rows, "files")


def sample_data(samples: Samples, colors: dict[str, int]) -> dict[str, Any]:
    """Return what the script of the page needs to show responses."""
    return {
        "models": samples.models,
        "colors": [colors.get(name, 0) for name in samples.models],
        "baseline": samples.baseline,
        "metrics": samples.metrics,
        "rows": samples.rows,
    }


def _last_step(record: StageRecord) -> int | None:
    """Return the last step at which training has logged something."""
    steps = [curve.steps[-1] for curve in record.curves.values()]
    return max(steps) if steps and record.stage != "evaluate" else None


def _total_size(files: list[FileSize]) -> Cell:
    return size(sum(file.size for file in files))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds") if seconds else ""
