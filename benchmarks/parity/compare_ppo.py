"""The rows of PPO: where the two differ, the difference is computed, taken out, and compared again."""

from collections.abc import Sequence
from itertools import chain
from statistics import fmean, pstdev
from typing import Any

from cases import Iteration
from compare import FLOOR, PPO_TOLERANCE, Row, largest_relative

BESSEL = (
    "TRL divides by the sample's standard deviation (n - 1), we by the population's (n), as Ziegler et al. 2019 and N+ "
    "do in their code: the same advantages up to a factor sqrt(1 - 1/n). Both are sound. In what says 'by n', and in "
    "the losses, TRL's are divided as ours"
)
SLOT = (
    "TRL puts the score one slot after the last token and bootstraps with a value there; ours comes with the last "
    "token, after which the value is 0 by definition. Ours is the textbook's; with lambda 1, or once the critic knows "
    "the score, both are the same"
)
SLOT_LOSS = (
    "TRL's critic also learns a value for the slot after the end, which is no token; ours, over answer tokens, is the "
    "loss as published"
)
PADDING = "TRL's mean runs over padding as well; ours, over answer tokens, is right"
FOLLOWS = "follows from the advantages above"
TENSORS = ("logprobs", "reference", "kl", "values", "scores")


def compare_iteration(
    setting: Iteration, ours: dict[str, Any], published: dict[str, Any], population: dict[str, Any]
) -> list[Row]:
    """The rows of one iteration.

    Args:
        setting: its gamma, lambda and so on.
        ours: what we computed.
        published: what TRL computed.
        population: what TRL computed when whitening by the population's standard deviation.
    """
    ragged = any(value is not None for value in published["value after the end"])
    parted = ragged and setting.gae_lambda < 1  # then it matters where the score stands
    why = SLOT if parted else ""
    theirs = population if setting.whiten_rewards else published
    what = f"PPO, {describe(setting, ours)}"

    rows = [tensor(what, name, ours[name], published[name]) for name in TENSORS]
    rows += [tensor(what, name, ours[name], theirs[name], why) for name in ("advantages", "returns")]
    if parted:
        for name in ("advantages", "returns"):
            label = f"{name} with the score moved to the last token"
            rows.append(tensor(what, label, ours[name], without_slot(setting, published, name)))

    name = "whitened advantages"
    rows.append(tensor(what, name, ours[name], published[name], BESSEL))
    if parted:
        moved = whiten(flat(without_slot(setting, published, "advantages")))
        rows.append(tensor(what, f"{name} with the score moved, by n", [flat(ours[name])], [moved]))
    else:
        rows.append(tensor(what, f"{name} by n", ours[name], population[name], FOLLOWS if why else ""))
    return rows + losses(what, ours["passes"], population, ragged, FOLLOWS if why else "")


def describe(setting: Iteration, ours: dict[str, Any]) -> str:
    lengths = {len(row["answer"]) for row in ours["rollout"]}
    tokens = f"{min(lengths)} to {max(lengths)}" if len(lengths) > 1 else str(max(lengths))
    whitened = ", whitened rewards" if setting.whiten_rewards else ""
    return (
        f"gamma {setting.gamma:g}, lambda {setting.gae_lambda:g}, KL by {setting.estimator}{whitened}, answers of "
        f"{tokens} tokens"
    )


def losses(what: str, ours: list[dict[str, float]], theirs: dict[str, Any], ragged: bool, follows: str) -> list[Row]:
    """The numbers of the passes, with TRL's advantages whitened as ours are.

    Args:
        follows: why the losses differ, where the advantages do.
    """
    other = theirs["passes"]
    rows = [number(what, "policy loss", ours, other, follows)]
    rows.append(number(what, "value loss", ours, other, SLOT_LOSS if ragged else follows))
    if ragged and not follows:
        first = {"value loss": value_loss_without_slot(theirs)}
        rows.append(number(what, "value loss", ours[:1], [first], label="value loss without the slot"))
    means = ("approximate KL", "entropy", "ratio")
    rows += [number(what, name, ours, other, PADDING if ragged else follows) for name in means]
    if ragged and not follows:
        real = [{name: each[f"{name}, real tokens"] for name in means} for each in other]
        rows += [number(what, name, ours, real, label=f"{name} without padding") for name in means]
    return rows


def number(
    what: str,
    name: str,
    ours: list[dict[str, float]],
    theirs: list[dict[str, float]],
    reason: str = "",
    label: str | None = None,
) -> Row:
    """A row of one number a pass."""
    apart = largest_relative([each[name] for each in ours], [each[name] for each in theirs], FLOOR)
    extent = f"{len(ours)} passes" if len(ours) > 1 else "first pass"
    return Row(what, label or name, extent, apart, PPO_TOLERANCE, reason)


def tensor(what: str, name: str, ours: list[Any], theirs: list[Any], reason: str = "") -> Row:
    """A row of a tensor's entries: differences relative to its largest entry."""
    one, other = flat(ours), flat(theirs)
    apart = largest_relative(one, other, floor=max(map(abs, [*one, *other])))
    extent = "tokens" if isinstance(ours[0], list) else "answers"
    return Row(what, name, f"{len(one)} {extent}", apart, PPO_TOLERANCE, reason)


def flat(rows: list[Any]) -> list[float]:
    return list(chain.from_iterable(row if isinstance(row, list) else [row] for row in rows))


def whiten(values: Sequence[float]) -> list[float]:
    mean, deviation = fmean(values), pstdev(values)
    return [(value - mean) / deviation for value in values]


def without_slot(setting: Iteration, theirs: dict[str, Any], name: str) -> list[list[float]]:
    """TRL's advantages or returns as they were with the score at the last token.

    There is a slot after the end with value V and score s, gamma is 1. At the last token TRL has
    A = r + V - V_last + lambda (s - V), we have A = r + s - V_last: (1 - lambda)(s - V) more, and each token before it
    sees lambda times that of the next.
    """
    moved = []
    for row, after, score in zip(theirs[name], theirs["value after the end"], theirs["scores"], strict=True):
        more = 0.0 if after is None else (1 - setting.gae_lambda) * (score - after)
        moved.append([value + more * setting.gae_lambda ** (len(row) - 1 - t) for t, value in enumerate(row)])
    return moved


def value_loss_without_slot(theirs: dict[str, Any]) -> float:
    """TRL's first value loss without the terms of the slots after the end.

    Nothing has been learned yet, so no value is clipped and a term is half its squared error.
    """
    pairs = zip(theirs["value after the end"], theirs["return after the end"], strict=True)
    extra = [0.5 * (value - target) ** 2 for value, target in pairs if value is not None]
    tokens = sum(map(len, theirs["values"]))
    return (theirs["passes"][0]["value loss"] * (tokens + len(extra)) - sum(extra)) / tokens
