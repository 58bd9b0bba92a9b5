"""Rows of the PPO table. Where the two sides differ, the known difference is removed and the rest is compared again."""

from collections.abc import Sequence
from itertools import chain
from statistics import fmean, pstdev
from typing import Any

from cases import Iteration
from compare import FLOOR, PPO_TOLERANCE, Row, largest_relative

BESSEL = (
    "TRL divides by the sample standard deviation (n - 1), we by the population standard deviation (n), as Ziegler et "
    "al. 2019 and N+ do in their code. The advantages are equal up to a factor sqrt(1 - 1/n), and both choices are "
    "sound. In rows marked 'by n', and in the losses, TRL's advantages are divided as ours."
)
SLOT = (
    "TRL places the score one position after the last token and bootstraps with a value there. We place it at the last "
    "token, after which the value is 0 by definition, as in the textbook. With lambda 1, or once the critic predicts "
    "the score, both agree."
)
SLOT_LOSS = (
    "TRL's critic also learns a value for the position after the end, which is not a token. Our loss covers response "
    "tokens, as published."
)
PADDING = "TRL's mean includes padding; our mean over response tokens is correct."
FOLLOWS = "Follows from the advantages above."
TENSORS = ("logprobs", "ref_logprobs", "kl", "values", "scores")


def compare_iteration(
    setting: Iteration, ours: dict[str, Any], published: dict[str, Any], population: dict[str, Any]
) -> list[Row]:
    """Return the rows of one iteration.

    Args:
        setting: gamma, lambda and so on.
        ours: What we computed.
        published: What TRL computed.
        population: What TRL computed when it whitened by the population standard deviation.
    """
    ragged = any(value is not None for value in published["value after the end"])
    score_matters = ragged and setting.gae_lambda < 1  # Advantages then depend on the position of the score.
    reason = SLOT if score_matters else ""
    theirs = population if setting.whiten_rewards else published
    case = f"PPO, {describe(setting, ours)}"

    rows = [tensor(case, name, ours[name], published[name]) for name in TENSORS]
    rows += [tensor(case, name, ours[name], theirs[name], reason) for name in ("advantages", "returns")]
    if score_matters:
        for name in ("advantages", "returns"):
            label = f"{name} with the score moved to the last token"
            rows.append(tensor(case, label, ours[name], without_slot(setting, published, name)))

    name = "whitened advantages"
    rows.append(tensor(case, name, ours[name], published[name], BESSEL))
    if score_matters:
        moved = whiten(flatten(without_slot(setting, published, "advantages")))
        rows.append(tensor(case, f"{name} with the score moved, by n", [flatten(ours[name])], [moved]))
    else:
        rows.append(tensor(case, f"{name} by n", ours[name], population[name], FOLLOWS if reason else ""))
    return rows + losses(case, ours["passes"], population, ragged, FOLLOWS if reason else "")


def describe(setting: Iteration, ours: dict[str, Any]) -> str:
    """Return the settings of an iteration as text."""
    lengths = {len(row["response"]) for row in ours["rollout"]}
    tokens = f"{min(lengths)} to {max(lengths)}" if len(lengths) > 1 else str(max(lengths))
    whitened = ", whitened rewards" if setting.whiten_rewards else ""
    return (
        f"gamma {setting.gamma:g}, lambda {setting.gae_lambda:g}, KL estimator {setting.estimator}{whitened}, "
        f"responses of {tokens} tokens"
    )


def losses(case: str, ours: list[dict[str, float]], theirs: dict[str, Any], ragged: bool, follows: str) -> list[Row]:
    """Return the rows of the passes, where TRL's advantages are whitened as ours are.

    Args:
        case: The case.
        ours: Our metrics of each pass.
        theirs: What TRL computed.
        ragged: Whether some responses are shorter than the longest one.
        follows: Why the losses differ if the advantages do.
    """
    other = theirs["passes"]
    rows = [scalar(case, "policy loss", ours, other, follows)]
    rows.append(scalar(case, "value loss", ours, other, SLOT_LOSS if ragged else follows))
    if ragged and not follows:
        first = {"value loss": value_loss_without_slot(theirs)}
        rows.append(scalar(case, "value loss", ours[:1], [first], label="value loss without the extra position"))
    means = ("approximate KL", "entropy", "ratio")
    rows += [scalar(case, name, ours, other, PADDING if ragged else follows) for name in means]
    if ragged and not follows:
        real = [{name: metrics[f"{name}, real tokens"] for name in means} for metrics in other]
        rows += [scalar(case, name, ours, real, label=f"{name} without padding") for name in means]
    return rows


def scalar(
    case: str,
    name: str,
    ours: list[dict[str, float]],
    theirs: list[dict[str, float]],
    reason: str = "",
    label: str | None = None,
) -> Row:
    """Return the row of a metric that has one value per pass."""
    difference = largest_relative([metrics[name] for metrics in ours], [metrics[name] for metrics in theirs], FLOOR)
    extent = f"{len(ours)} passes" if len(ours) > 1 else "first pass"
    return Row(case, label or name, extent, difference, PPO_TOLERANCE, reason)


def tensor(case: str, name: str, ours: list[Any], theirs: list[Any], reason: str = "") -> Row:
    """Return the row of a tensor. Differences are relative to its largest entry."""
    one, other = flatten(ours), flatten(theirs)
    difference = largest_relative(one, other, floor=max(map(abs, [*one, *other])))
    extent = "tokens" if isinstance(ours[0], list) else "responses"
    return Row(case, name, f"{len(one)} {extent}", difference, PPO_TOLERANCE, reason)


def flatten(rows: list[Any]) -> list[float]:
    return list(chain.from_iterable(row if isinstance(row, list) else [row] for row in rows))


def whiten(values: Sequence[float]) -> list[float]:
    mean, deviation = fmean(values), pstdev(values)
    return [(value - mean) / deviation for value in values]


def without_slot(setting: Iteration, theirs: dict[str, Any], name: str) -> list[list[float]]:
    """Return TRL's advantages or returns as they would be with the score at the last token.

    The position after the end has value V and score s, and gamma is 1. At the last token, TRL has
    A = r + V - V_last + lambda (s - V), and we have A = r + s - V_last, which is (1 - lambda) (s - V) more. At each
    earlier token, the difference is lambda times that of the next token.
    """
    moved = []
    for row, after, score in zip(theirs[name], theirs["value after the end"], theirs["scores"], strict=True):
        more = 0.0 if after is None else (1 - setting.gae_lambda) * (score - after)
        moved.append([value + more * setting.gae_lambda ** (len(row) - 1 - t) for t, value in enumerate(row)])
    return moved


def value_loss_without_slot(theirs: dict[str, Any]) -> float:
    """Return TRL's first value loss without the terms of the positions after the end.

    Before the first update, no value is clipped, and a term is half a squared error.
    """
    pairs = zip(theirs["value after the end"], theirs["return after the end"], strict=True)
    extra = [0.5 * (value - target) ** 2 for value, target in pairs if value is not None]
    tokens = sum(map(len, theirs["values"]))
    return (theirs["passes"][0]["value loss"] * (tokens + len(extra)) - sum(extra)) / tokens
