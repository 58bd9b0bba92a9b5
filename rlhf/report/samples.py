"""Responses of all models side by side, with the words that differ from the baseline."""

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.metrics.evaluation_names import TARGET
from rlhf.report.events import is_finite

WORDS = re.compile(r"\s+|\w+|[^\w\s]")
MAX_COMPARED = 4000  # words and spaces of a text; longer ones are compared as a whole
MAX_CHARACTERS = 1_500_000  # of all texts in a report
SCORERS = ("reward", "gold")  # metrics that come first
SAME, ADDED, REMOVED = 0, 1, 2
Segment = tuple[int, str]


@dataclass
class Samples:
    """Responses of an evaluation.

    Args:
        models: Names of the models, the baseline first, then the other ones in the order of the file.
        baseline: Name of the model that the others are compared with.
        metrics: Names of the metrics of a response.
        rows: One entry per prompt: ``prompt``, ``target`` and ``responses``. A response has its metrics, and its text
            as segments: those that it has in common with the baseline, those that are added, those that are removed.
        total: Number of prompts in the file.
        problems: What cannot be read.
    """

    models: list[str] = field(default_factory=list)
    baseline: str = ""
    metrics: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    problems: list[str] = field(default_factory=list)


def read_samples(path: Path, baseline: str, max_prompts: int) -> Samples:
    """Read samples.jsonl.

    Args:
        path: The file. If there is none, the result is empty.
        baseline: Name of the model that the others are compared with.
        max_prompts: Largest number of prompts to show.
    """
    samples = Samples(baseline=baseline)
    characters = damaged = 0
    for row in _rows(path):
        samples.total += 1
        if row is None:
            damaged += 1
            continue
        characters += _characters(row)
        if len(samples.rows) < max_prompts and (characters <= MAX_CHARACTERS or not samples.rows):
            samples.rows.append(_compared(row, baseline))
            for name, response in row["responses"].items():
                samples.models += [] if name in samples.models else [name]
                new = [key for key, value in response.items() if key != "text" and is_finite(value)]
                samples.metrics += [key for key in new if key not in samples.metrics]
    samples.models.sort(key=lambda name: name != baseline)
    samples.metrics.sort(key=lambda name: SCORERS.index(name) if name in SCORERS else len(SCORERS))
    if damaged:
        samples.problems.append(f"{path}: {damaged} lines are damaged and left out.")
    return samples


def word_segments(baseline: str, text: str) -> list[Segment]:
    """Return the words of a text that a baseline has as well, those that it adds, and those that it lacks."""
    old, new = WORDS.findall(baseline), WORDS.findall(text)
    if old == new:
        return [(SAME, text)]
    if max(len(old), len(new)) > MAX_COMPARED:
        return [(REMOVED, baseline), (ADDED, text)]
    segments: list[Segment] = []
    for kind, start, end, new_start, new_end in difflib.SequenceMatcher(None, old, new).get_opcodes():
        if kind == "equal":
            segments.append((SAME, "".join(new[new_start:new_end])))
            continue
        if end > start:
            segments.append((REMOVED, "".join(old[start:end])))
        if new_end > new_start:
            segments.append((ADDED, "".join(new[new_start:new_end])))
    return segments


def _rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the row of each line; None for one that is damaged."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip():
                yield _row(line)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        texts = [response["text"] for response in row["responses"].values()]
        is_valid = all(isinstance(text, str) for text in (row["prompt"], *texts))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return row if is_valid else None


def _characters(row: dict[str, Any]) -> int:
    texts = [response["text"] for response in row["responses"].values()]
    return len(row["prompt"]) + len(str(row.get("target") or "")) + sum(map(len, texts))


def _compared(row: dict[str, Any], baseline: str) -> dict[str, Any]:
    """Return a row with the segments of each response in place of its text."""
    responses = row["responses"]
    reference = responses.get(baseline, {}).get("text")
    compared = {}
    for name, response in responses.items():
        text = response["text"]
        is_alone = reference is None or name == baseline
        segments = [(SAME, text)] if is_alone else word_segments(reference, text)
        metrics = {key: value for key, value in response.items() if key != "text" and is_finite(value)}
        compared[str(name)] = {"segments": segments, "metrics": metrics}
    target = row.get(TARGET)
    return {"prompt": row["prompt"], "target": target if isinstance(target, str) else None, "responses": compared}
