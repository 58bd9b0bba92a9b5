"""The rows of PPO: where the two implementations differ, the difference is computed, taken out, and compared again."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from cases import Rollout
from compare import FLOOR, PPO_TOLERANCE, Row, compare_series

BESSEL = (
    "TRL divides by the sample's standard deviation (n - 1), we by the population's (n), as the code of Ziegler et al. "
    "2019 and N+ do: the same advantages up to the factor sqrt(1 - 1/n). Both are sound; the next rows take it out"
)
SLOT = (
    "TRL puts the score one slot after the last token and bootstraps with a value there; ours comes with the last "
    "token, after which the value is 0 by definition. Ours is the textbook's; with lambda 1 both are the same"
)
SLOT_LOSS = (
    "TRL's critic also learns a value for the slot after the end, which is not a token; ours, over answer tokens, is "
    "the loss as it is published"
)
PADDING = "TRL's mean runs over padding as well: ours, over answer tokens, is right"
FOLLOWS = "follows from other advantages, see above"
TENSORS = ("logprobs", "reference", "kl", "values", "scores")


def compare_rollout(
    rollout: Rollout, ours: dict[str, Any], published: dict[str, Any], population: dict[str, Any]
) -> list[Row]:
    """The rows of one rollout.

    Args:
        rollout: its setting.
        ours: what we computed.
        published: what TRL computed.
        population: what TRL computed when whitening by the population's standard deviation.
    """
    what = f"PPO, gamma {rollout.gamma:g}, lambda {rollout.gae_lambda:g}, " + describe(ours)
    slots = any(value is not None for value in published["value after the end"])
    parted = slots and rollout.gae_lambda < 1  # the score's place matters then
    rows = [tensor(what, name, ours[name], published[name]) for name in TENSORS]
    for name in ("advantages", "returns"):
        rows.append(tensor(what, name, ours[name], published[name], SLOT))
        if parted:
            moved = without_slot(rollout, published, name)
            rows.append(tensor(what, f"{name}, score moved to the last token", ours[name], moved))
    rows.append(
        tensor(what, "whitened advantages", ours["whitened advantages"], published["whitened advantages"], BESSEL)
    )
    if not parted:
        label = "whitened advantages, same deviation"
        rows.append(tensor(what, label, ours["whitened advantages"], population["whitened advantages"]))
    rows += losses(what, ours["passes"], population["passes"], slots, parted)
    if slots:
        one, other = ours["passes"][0]["value loss"], value_loss_without_slot(published)
        label = "value loss, first pass, without the slot"
        if not parted:
            rows.append(number(what, label, [one], [other], "1"))
    return rows


def describe(ours: dict[str, Any]) -> str:
    lengths = [len(row["answer"]) for row in ours["rollout"]]
    return (
        f"answers of {min(lengths)} to {max(lengths)} tokens"
        if min(lengths) < max(lengths)
        else "answers of one length"
    )


def losses(
    what: str, ours: list[dict[str, float]], theirs: list[dict[str, float]], slots: bool, parted: bool
) -> list[Row]:
    """The numbers of the passes, with TRL's advantages whitened as ours are."""
    rows = []
    for name, reason in {"policy loss": FOLLOWS, "value loss": SLOT_LOSS}.items():
        rows.append(number(what, name, column(ours, name), column(theirs, name), f"{len(ours)}", reason))
    for name in ("approximate KL", "entropy", "ratio"):
        rows.append(number(what, name, column(ours, name), column(theirs, name), f"{len(ours)}", PADDING))
        if slots and not parted:
            label = f"{name}, real tokens"
            rows.append(number(what, label, column(ours, name), column(theirs, label), f"{len(ours)}"))
    return rows


def column(passes: list[dict[str, float]], name: str) -> list[float]:
    return [each[name] for each in passes]


def number(what: str, name: str, ours: Sequence[float], theirs: Sequence[float], passes: str, reason: str = "") -> Row:
    return compare_series(
        what, name, ours, theirs, floor=FLOOR, tolerance=PPO_TOLERANCE, steps=f"{passes} passes", reason=reason
    )


def tensor(what: str, name: str, ours: list[Any], theirs: list[Any], reason: str = "") -> Row:
    """A row of tensors: differences relative to the largest entry."""
    one, other = flat(ours), flat(theirs)
    largest = max(map(abs, [*one, *other]))
    return compare_series(
        what, name, one, other, floor=largest, tolerance=PPO_TOLERANCE, steps=f"{len(one)} entries", reason=reason
    )


def flat(rows: list[Any]) -> list[float]:
    return list(chain.from_iterable(row if isinstance(row, list) else [row] for row in rows))


def without_slot(rollout: Rollout, theirs: dict[str, Any], name: str) -> list[list[float]]:
    """TRL's advantages or returns as they were with the score at the last token.

    There is a slot after the end with value V and score s, gamma is 1. At the last token TRL has
    A = r + V - V_last + lambda (s - V), we have A = r + s - V_last: (1 - lambda)(s - V) more, and each token before it
    sees lambda times that of the next.
    """
    moved = []
    for row, after, score in zip(theirs[name], theirs["value after the end"], theirs["scores"], strict=True):
        more = 0.0 if after is None else (1 - rollout.gae_lambda) * (score - after)
        moved.append([value + more * rollout.gae_lambda ** (len(row) - 1 - t) for t, value in enumerate(row)])
    return moved


def value_loss_without_slot(theirs: dict[str, Any]) -> float:
    """TRL's first value loss without the terms of the slots after the end.

    Nothing has been learned yet, so no value is clipped and a term is half its squared error.
    """
    pairs = zip(theirs["value after the end"], theirs["return after the end"], strict=True)
    extra = [0.5 * (value - target) ** 2 for value, target in pairs if value is not None]
    tokens = sum(map(len, theirs["values"]))
    return (theirs["passes"][0]["value loss"] * (tokens + len(extra)) - sum(extra)) / tokens
