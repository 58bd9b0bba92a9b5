"""Metrics of evaluation: means and win rates with bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.evaluate.objective import bootstrap_interval, rouge_l, wins
from rlhf.metrics.evaluation_names import SCORERS, TARGET, WIN_RATE


@dataclass
class ModelResponses:
    """Responses of one model to all prompts, with per-response metrics.

    Args:
        texts: Responses as text, in the order of the prompts.
        metrics: Metrics by name, with one value per response.
    """

    texts: list[str] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def add(self, texts: Sequence[str], **metrics: Tensor | Sequence[float]) -> None:
        """Append the responses to a batch of prompts."""
        self.texts += texts
        for name, values in metrics.items():
            self.metrics.setdefault(name, []).extend(float(value) for value in values)

    def scores(self, scorer: str) -> Tensor:
        """[prompts] one metric as a tensor."""
        return torch.tensor(self.metrics[scorer], dtype=torch.float64)


def compare_with_targets(responses: dict[str, ModelResponses], prompts: int) -> None:
    """Add ROUGE-L to every model if all prompts have a target; otherwise remove the targets, in place.

    Averages over different sets of prompts would not be comparable.

    Args:
        responses: Responses of each model by name, and the targets as ``TARGET``.
        prompts: Number of prompts.
    """
    targets = responses.get(TARGET)
    if targets is None:
        return
    if len(targets.texts) < prompts:
        del responses[TARGET]
        return
    for model in responses.values():
        model.metrics["rougeL"] = rouge_l(model.texts, targets.texts).tolist()


def summarize(responses: dict[str, ModelResponses], *, baseline: str, bootstrap: int) -> dict[str, dict[str, Any]]:
    """Average the metrics of each model over all prompts, and compute win rates.

    Args:
        responses: Responses of each model by name.
        baseline: Name of the model that the others are compared with. They are compared with ``TARGET`` as well.
        bootstrap: Number of resamples behind each interval.

    Returns:
        For each model, ``{"mean", "low", "high"}`` of each metric and ``{"value", "low", "high"}`` of each win rate, as
        ``win_rate_vs_<other>``, by scorer.
    """

    def interval(values: Tensor, middle: str) -> dict[str, float]:
        return dict(zip((middle, "low", "high"), bootstrap_interval(values, draws=bootstrap), strict=True))

    summary: dict[str, dict[str, Any]] = {}
    for name, model in responses.items():
        summary[name] = {metric: interval(torch.as_tensor(values), "mean") for metric, values in model.metrics.items()}
        for other in (baseline, TARGET):
            if other != name and other in responses:
                summary[name][WIN_RATE + other] = {
                    scorer: interval(wins(model.scores(scorer), responses[other].scores(scorer)), "value")
                    for scorer in SCORERS
                    if scorer in model.metrics
                }
    return summary


def point_estimates(summary: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Flatten a summary to scalars for loggers, such as ``ppo/win_rate_vs_sft/gold``. Undefined values are left out."""
    flat = {}
    for model, metrics in summary.items():
        for metric, value in metrics.items():
            by_scorer = value if metric.startswith("win_rate") else {"": value}
            for scorer, interval in by_scorer.items():
                estimate = point_estimate(interval)
                if estimate == estimate:  # not NaN
                    flat["/".join(part for part in (model, metric, scorer) if part)] = estimate
    return flat


def point_estimate(interval: dict[str, float]) -> float:
    """Return the mean or win rate at the center of an interval."""
    return interval["value"] if "value" in interval else interval["mean"]


def monitored_win_rate(summary: dict[str, dict[str, Any]], baseline: str) -> float:
    """Return the win rate of the last model against the baseline, which ``train.py`` returns for sweeps.

    The gold score decides if there is one, otherwise the reward model. NaN if there is neither.
    """
    rates = [metrics.get(WIN_RATE + baseline, {}) for name, metrics in summary.items() if name != TARGET]
    last: dict[str, Any] = next((rate for rate in reversed(rates) if rate), {})
    return next((float(last[scorer]["value"]) for scorer in SCORERS if scorer in last), float("nan"))
