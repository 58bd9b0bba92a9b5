"""What the choices of a session say so far: agreement of the annotators, of the reward model, and win rates."""

import math
from itertools import combinations
from typing import Any

from rlhf.label.journal import DECISIONS
from rlhf.label.session import Session
from rlhf.label.statistics import cohens_kappa, wilson_interval


def summarize(session: Session) -> dict[str, Any]:
    """Return the statistics of a session.

    Returns:
        ``annotators``: number of choices of each; ``kappa``: Cohen's kappa of every two annotators with common pairs;
        ``reward_model``: share of decided choices with the higher score, with its interval; ``win_rates``: of each
        model over each other one, with intervals. A tie, or two bad responses, count as half a win.
    """
    return {
        "annotators": _annotators(session),
        "kappa": _kappas(session),
        "reward_model": _reward_model(session),
        "win_rates": _win_rates(session),
    }


def _decisions(session: Session) -> list[tuple[str, str, str]]:
    """Return pair, annotator and choice of every choice that is not a skip."""
    return [
        (key, name, event.choice)
        for key in session.pairs
        for name, event in session.choices[key].items()
        if event.choice in DECISIONS
    ]


def _annotators(session: Session) -> dict[str, int]:
    names = [name for _, name, _ in _decisions(session)]
    return {name: names.count(name) for name in sorted(set(names))}


def _kappas(session: Session) -> list[dict[str, Any]]:
    by_annotator: dict[str, dict[str, str]] = {}
    for key, name, choice in _decisions(session):
        by_annotator.setdefault(name, {})[key] = choice
    found = []
    for one, two in combinations(sorted(by_annotator), 2):
        common = [
            (choice, by_annotator[two][key]) for key, choice in by_annotator[one].items() if key in by_annotator[two]
        ]
        if common:
            kappa = cohens_kappa(common)
            found.append({"annotators": [one, two], "kappa": _number(kappa), "pairs": len(common)})
    return found


def _reward_model(session: Session) -> dict[str, float] | None:
    agreements = []
    for key, _, choice in _decisions(session):
        first, second = session.pairs[key].first.score, session.pairs[key].second.score
        if choice in ("first", "second") and first is not None and second is not None and first != second:
            agreements.append((first > second) == (choice == "first"))
    return _proportion(sum(agreements), len(agreements))


def _win_rates(session: Session) -> list[dict[str, Any]]:
    wins: dict[tuple[str, str], list[float]] = {}
    for key, _, choice in _decisions(session):
        pair, won = session.pairs[key], {"first": 1.0, "second": 0.0}.get(choice, 0.5)
        for first, second in pair.matchups:
            if first and second and first != second:
                ordered, share = ((first, second), won) if first < second else ((second, first), 1.0 - won)
                wins.setdefault(ordered, []).append(share)
    return [
        {"model": model, "versus": versus, **(_proportion(sum(won), len(won)) or {})}
        for (model, versus), won in sorted(wins.items())
    ]


def _proportion(successes: float, count: int) -> dict[str, float] | None:
    if not count:
        return None
    value, low, high = wilson_interval(successes, count)
    return {"value": value, "low": low, "high": high, "choices": count}


def _number(value: float) -> float | None:
    """Return a number as JSON can have it: None for NaN."""
    return None if math.isnan(value) else value
