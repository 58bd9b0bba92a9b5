"""Evaluation in a report: metrics and win rates of all policies, and rewards against the KL divergence."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from rlhf.metrics.evaluation_names import KL_TO, TARGET, WIN_RATE
from rlhf.report.events import is_finite
from rlhf.report.figures import Line, Plot
from rlhf.report.plots import Point, intervals_plot, tradeoff_plot
from rlhf.report.records import RunRecord, StageRecord
from rlhf.report.tables import Cell, Table, interval, text

TITLES = {"gold": "gold score", "reward": "reward model"}  # of the scorers
ORDER = ("gold", "reward", KL_TO, "length", "truncated", "rougeL")  # columns that come first


@dataclass(frozen=True)
class Evaluation:
    """What a report shows of an evaluation.

    Args:
        prompts: Number of prompts; None if it is unknown.
        baseline: Name of the model that the others are compared with.
        metrics: Means of all metrics.
        win_rates: Win rates of each policy.
        plots: The same win rates, one plot for each opponent.
    """

    prompts: int | None
    baseline: str
    metrics: Table
    win_rates: Table
    plots: list[Plot] = field(default_factory=list)


def policy_colors(run: RunRecord) -> dict[str, int]:
    """Return the number of the color of each policy. A policy has the same color in all plots."""
    names = [record.name for record in run.stages if record.stage not in ("reward", "evaluate", "collect")]
    compared = models_of(run.evaluation)
    return {name: number for number, name in enumerate(dict.fromkeys([*names, *compared]))}


def models_of(record: StageRecord | None) -> dict[str, dict[str, Any]]:
    """Return the metrics of each evaluated model; empty without an evaluation. Damaged entries are left out."""
    models = record.metrics.get("models") if record is not None else None
    if not isinstance(models, dict):
        return {}
    return {str(name): metrics for name, metrics in models.items() if isinstance(metrics, dict)}


def baseline_of(record: StageRecord) -> str:
    """Return the model that an evaluation compares the others with, from its configuration or else its metrics."""
    stage = record.config.get("stage")
    if isinstance(stage, dict) and isinstance(stage.get("baseline"), str):
        return str(stage["baseline"])
    keys = [key for metrics in models_of(record).values() for key in metrics if key.startswith(KL_TO)]
    return keys[0].removeprefix(KL_TO) if keys else "sft"


def ordered_metrics(models: Iterable[dict[str, Any]]) -> list[str]:
    """Return the metrics of several models in the order of their columns, without win rates."""
    keys = list(dict.fromkeys(key for metrics in models for key in metrics if not key.startswith(WIN_RATE)))
    return sorted(
        keys, key=lambda key: next((rank for rank, prefix in enumerate(ORDER) if key.startswith(prefix)), len(ORDER))
    )


def summarize_evaluation(record: StageRecord, colors: dict[str, int]) -> Evaluation:
    """Build the tables and the plots of an evaluation."""
    models = models_of(record)
    keys = ordered_metrics(models.values())
    rows = [
        [text(name, color=colors.get(name)), *(interval(metrics.get(key)) for key in keys)]
        for name, metrics in models.items()
    ]
    rates = _win_rates(models)
    table = Table(
        ["policy", "against", "scored by", "win rate"],
        [
            [text(name, color=colors.get(name)), text(other), text(TITLES.get(scorer, scorer)), interval(entry)]
            for name, other, scorer, entry in rates
        ],
        "win-rates",
    )
    prompts = record.metrics.get("prompts")
    return Evaluation(
        prompts if isinstance(prompts, int) else None,
        baseline_of(record),
        Table(["policy", *map(column_title, keys)], rows, "evaluation-metrics"),
        table,
        _win_rate_plots(rates, colors, baseline_of(record)),
    )


def _win_rates(models: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Return policy, opponent, scorer and interval of every win rate."""
    return [
        (name, key.removeprefix(WIN_RATE), str(scorer), entry)
        for name, metrics in models.items()
        for key, by_scorer in metrics.items()
        if key.startswith(WIN_RATE) and isinstance(by_scorer, dict)
        for scorer, entry in by_scorer.items()
        if isinstance(entry, dict) and all(is_finite(entry.get(key)) for key in ("value", "low", "high"))
    ]


def _win_rate_plots(
    rates: list[tuple[str, str, str, dict[str, Any]]], colors: dict[str, int], baseline: str
) -> list[Plot]:
    """Draw the win rates over each opponent, the baseline first."""
    plots: list[Plot] = []
    for other in sorted(dict.fromkeys(rate[1] for rate in rates), key=lambda other: other != baseline):
        rows = [
            (f"{name}, {TITLES.get(scorer, scorer)}", entry["value"], entry["low"], entry["high"], colors.get(name, 0))
            for name, opponent, scorer, entry in rates
            if opponent == other and (name != TARGET or other == TARGET)
        ]
        if rows:
            title = f"Against {'the reference responses (target)' if other == TARGET else other}"
            plots.append(intervals_plot(f"wins-{len(plots)}", title, rows, "win rate"))
    return plots


def column_title(key: str) -> str:
    """Return the title of a metric of the evaluation, with its unit."""
    if key.startswith(KL_TO):
        return f"KL to {key.removeprefix(KL_TO)} (nats)"
    known = {
        "gold": "gold score",
        "reward": "reward model",
        "length": "length (tokens)",
        "truncated": "truncated (share)",
        "rougeL": "ROUGE-L to target",
    }
    return known.get(key, key)


def tradeoff_plots(run: RunRecord, colors: dict[str, int]) -> list[Plot]:
    """Draw the reward, and the gold score where there is one, against the KL divergence to the reference model."""
    lines = []
    for record in run.stages:
        kl, scores = record.curves.get("objective/kl"), record.curves.get("objective/scores")
        if kl is None or scores is None:
            continue
        score_at = dict(zip(scores.steps, scores.values, strict=True))
        known = [(step, x) for step, x in zip(kl.steps, kl.values, strict=True) if is_finite(x)]
        pairs = [(x, score_at[step]) for step, x in known if step in score_at]
        label = f"{record.name}, training"
        lines.append(Line(label, [x for x, _ in pairs], [y for _, y in pairs], colors.get(record.name, 0)))
    by_reward, by_gold = _points(run, "reward", colors), _points(run, "gold", colors)
    plots = []
    x_label = "KL to the reference model (nats per response)"
    if lines or by_reward:
        title = "Reward against KL"
        plots.append(tradeoff_plot("tradeoff-reward", title, lines, by_reward, x_label, "reward"))
    if by_gold:
        title = "Gold score against KL"
        plots.append(tradeoff_plot("tradeoff-gold", title, [], by_gold, x_label, "gold score"))
    return plots


def _points(run: RunRecord, metric: str, colors: dict[str, int]) -> list[Point]:
    """Return the evaluated policies that have both a KL divergence and a metric."""
    if run.evaluation is None:
        return []
    points, kl = [], f"{KL_TO}{baseline_of(run.evaluation)}"
    for name, metrics in models_of(run.evaluation).items():
        x, y = metrics.get(kl), metrics.get(metric)
        if _has_mean(x) and _has_mean(y):
            points.append(Point(name, x["mean"], y["mean"], _range(x), _range(y), colors.get(name, 0)))
    return points


def _has_mean(entry: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(entry, dict) and is_finite(entry.get("mean"))


def _range(entry: dict[str, Any]) -> tuple[float, float] | None:
    low, high = entry.get("low"), entry.get("high")
    return (float(low), float(high)) if is_finite(low) and is_finite(high) else None  # type: ignore[arg-type]


def headline_rates(record: StageRecord) -> list[tuple[str, str, Cell]]:
    """Return policy, opponent with scorer, and win rate over the baseline: by the gold score, or else the rewards."""
    baseline, found = baseline_of(record), []
    for name, metrics in models_of(record).items():
        by_scorer = metrics.get(f"{WIN_RATE}{baseline}")
        if name != TARGET and isinstance(by_scorer, dict):
            scorer = next((scorer for scorer in TITLES if scorer in by_scorer), None)
            if scorer is not None:
                found.append((name, f"{baseline} by the {TITLES[scorer]}", interval(by_scorer[scorer])))
    return found
