"""The content of the report that compares several runs, or the jobs of a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.metrics.evaluation_names import WIN_RATE
from rlhf.report.curves import PREFERRED, SHOWN, identifier, metric_groups
from rlhf.report.evaluation import baseline_of, column_title, models_of, ordered_metrics
from rlhf.report.figures import LegendEntry, Line, Plot
from rlhf.report.plots import curves_plot
from rlhf.report.records import RunRecord, StageRecord
from rlhf.report.settings import commands, differing_settings
from rlhf.report.tables import Cell, Table, code, duration, interval, number, text

MAX_METRICS = 10  # columns of the table of a stage


@dataclass(frozen=True)
class StageComparison:
    """One stage in several runs.

    Args:
        name: Directory of the stage in each run, or the stage itself in a sweep.
        metrics: Last value of the metrics of validation, by run.
        plots: Curves of all runs.
        settings: Settings that differ.
    """

    name: str
    metrics: Table
    plots: list[Plot] = field(default_factory=list)
    settings: Table | None = None


def comparison_content(title: str, runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return what the template of a comparison shows.

    Args:
        title: Title of the report.
        runs: The runs in the order of their colors.
    """
    labels = short_names([run.name for run in runs])
    evaluation = _evaluation_table(labels, runs)
    stages = [_compare(name, labels, records) for name, records in _by_stage(runs).items() if name != "evaluation"]
    sections = [("runs-section", "Runs"), *([("evaluation", "Evaluation")] if evaluation else [])]
    sections += [(f"stage-{stage.name}", stage.name) for stage in stages]
    return {
        "title": title,
        "sections": [*sections, ("reproduce", "Commands")],
        "hover": {plot.id: plot.hover for stage in stages for plot in stage.plots},
        "problems": [
            f"{label}: {problem}" for label, run in zip(labels, runs, strict=True) for problem in run.problems
        ],
        "runs": _run_table(labels, runs),
        "legend": [LegendEntry(label, number) for number, label in enumerate(labels)],
        "evaluation": evaluation,
        "stages": stages,
        "commands": {label: commands(run) for label, run in zip(labels, runs, strict=True)},
        "names": list(zip(labels, [str(run.path) for run in runs], strict=True)),
    }


def short_names(names: Sequence[str]) -> list[str]:
    """Return names without the overrides that all of them contain. The name of a job consists of its overrides."""
    parts = [name.split(",") for name in names]
    if len(names) < 2:
        return list(names)
    shared = set.intersection(*map(set, parts))
    short = [",".join(part for part in own if part not in shared) for own in parts]
    return short if all(short) and len(set(short)) == len(short) else list(names)


def _by_stage(runs: Sequence[RunRecord]) -> dict[str, list[StageRecord | None]]:
    """Return the records of each stage by its name, one for each run; None where a run has not started it."""
    # A job of a sweep over one stage is the directory of this stage, whose name is that of the job.
    own = [{_name(record, run): record for record in run.stages} for run in runs]
    names = dict.fromkeys(name for records in own for name in records)
    return {name: [records.get(name) for records in own] for name in names}


def _name(record: StageRecord, run: RunRecord) -> str:
    name = record.stage if record.path == run.path else record.name
    return "evaluation" if name == "evaluate" else name


def _run_table(labels: Sequence[str], runs: Sequence[RunRecord]) -> Table:
    rows = []
    for number_, (label, run) in enumerate(zip(labels, runs, strict=True)):
        times = [record.log.seconds for record in run.stages if record.log.seconds is not None]
        total = sum(times) if times else None
        alerts = [alert for record in run.stages for alert in record.alerts]
        states = [f"{_name(record, run)}: {record.state}" for record in run.stages]
        metrics = [f"{_name(record, run)}: {record.metric}" for record in run.stages if record.metric]
        rows.append(
            [
                text(label, color=number_),
                text("\n".join(states) or "no stage"),
                text("\n".join(metrics)),
                Cell(duration(total), total),
                number(len(alerts)),
            ]
        )
    return Table(["run", "state", "main metric", "time", "alerts"], rows, "runs")


def _evaluation_table(labels: Sequence[str], runs: Sequence[RunRecord]) -> Table | None:
    """Return the metrics of every policy of every run that was evaluated; None if none was."""
    found = [
        (label, number_, record, name, metrics)
        for number_, (label, run) in enumerate(zip(labels, runs, strict=True))
        for record in run.of_stage("evaluate")
        for name, metrics in models_of(record).items()
    ]
    keys = ordered_metrics(metrics for *_, metrics in found)
    rows = []
    for label, number_, record, name, metrics in found:
        rates = metrics.get(f"{WIN_RATE}{baseline_of(record)}")
        by_scorer = rates if isinstance(rates, dict) else {}
        wins = [interval(by_scorer.get(scorer)) for scorer in ("gold", "reward")]
        rows.append([text(label, color=number_), text(name), *wins, *(interval(metrics.get(key)) for key in keys)])
    columns = ["run", "policy", "wins (gold score)", "wins (reward model)"]
    return Table([*columns, *map(column_title, keys)], rows, "evaluation-metrics") if rows else None


def _compare(name: str, labels: Sequence[str], records: Sequence[StageRecord | None]) -> StageComparison:
    known = [
        (label, number_, record) for number_, (label, record) in enumerate(zip(labels, records, strict=True)) if record
    ]
    names = dict.fromkeys(metric for *_, record in known for metric in record.curves)
    metrics = [metric for metric in names if metric.startswith("val/")][:MAX_METRICS]
    rows = [
        [text(label, color=number_), *(_last(record, metric) for metric in metrics)] for label, number_, record in known
    ]
    table = Table(["run", *metrics], rows, f"metrics-{identifier(name)}")
    return StageComparison(name, table, _plots(name, known), _settings(name, known))


def _last(record: StageRecord, metric: str) -> Cell:
    curve = record.curves.get(metric)
    return Cell("") if curve is None else number(curve.last)


def _plots(name: str, known: Sequence[tuple[str, int, StageRecord]]) -> list[Plot]:
    """Draw the main metrics that any run has logged more than once, with one line per run."""
    available = dict.fromkeys(metric for *_, record in known for metric in metric_groups(record.curves))
    chosen = [metric for metric in PREFERRED if metric in available][:SHOWN]
    plots = []
    for metric in chosen or list(available)[:SHOWN]:
        lines = [
            Line(label, record.curves[metric].steps, record.curves[metric].values, number_)
            for label, number_, record in known
            if metric in record.curves
        ]
        plots.append(curves_plot(f"compare-{identifier(name)}-{identifier(metric)}", metric, lines, compares=True))
    return plots


def _settings(name: str, known: Sequence[tuple[str, int, StageRecord]]) -> Table | None:
    """Return the settings that differ between the runs; None if there is only one run or none differs."""
    differing = differing_settings({label: record.config for label, _, record in known})
    if len(known) < 2 or not differing:
        return None
    rows = [[code(key), *(code(values.get(label, "")) for label, *_ in known)] for key, values in differing.items()]
    return Table(["setting", *(label for label, *_ in known)], rows, f"settings-{identifier(name)}")
