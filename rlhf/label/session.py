"""One labeling session: which pair an annotator gets next, and what the choices amount to."""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlhf.errors import ConfigError, DataError, first_line
from rlhf.files import atomic_write
from rlhf.label.journal import DECISIONS, UNDO, Event, Journal
from rlhf.label.pairs import Pair

OTHER = {"first": "second", "second": "first"}


class Session:
    """The state of a labeling session. All of it is in the journal, so a session continues after a crash.

    Rows of ``preferences.jsonl`` whose responses are not among the pairs stay in the file.

    Args:
        pairs: Pairs in the order in which they are shown.
        directory: Directory of ``journal.jsonl`` and ``preferences.jsonl``.
        overlap: Share of the pairs that every annotator labels. Each other pair is labeled by one of them.
        seed: Seed of the sides on which responses are shown.

    Raises:
        DataError: A line of one of the files is damaged.
    """

    def __init__(self, pairs: Sequence[Pair], directory: Path, *, overlap: float = 0.1, seed: int = 1) -> None:
        self.pairs = {pair.id: pair for pair in pairs}
        self.overlap, self.seed = overlap, seed
        self.journal = Journal(directory / "journal.jsonl")
        self.preferences = directory / "preferences.jsonl"
        self.choices: dict[str, dict[str, Event]] = defaultdict(dict)  # of each pair, by annotator
        self._shown: dict[str, str] = {}  # the annotator that looks at a pair now
        self._rows_of_others = self._read_rows_of_others()
        self._reversed = {replace(pair, first=pair.second, second=pair.first).id: pair.id for pair in pairs}
        self.journal.events = [self._in_this_order(event) for event in self.journal.events]
        for event in self.journal.events:
            self._apply(event)
        if self.journal.events:
            self._write_preferences()

    # Interface

    def next_pair(self, annotator: str) -> Pair | None:
        """Return the pair that an annotator labels next; None if none is left."""
        looked_at = None
        for key, pair in self.pairs.items():
            if annotator in self.choices[key]:
                continue
            if self.is_shared(pair):
                return pair
            if any(event.choice in DECISIONS for event in self.choices[key].values()):
                continue
            if self._shown.get(key, annotator) == annotator:
                self._shown = {k: who for k, who in self._shown.items() if who != annotator} | {key: annotator}
                return pair
            looked_at = looked_at or pair
        return looked_at  # Whoever looks at it may have left.

    def left(self, pair: Pair, annotator: str) -> str:
        """Return which response is on the left: ``first`` or ``second``. It is the same again after a restart."""
        digest = hashlib.sha256(f"{self.seed}:{annotator}:{pair.id}".encode()).digest()
        return "first" if digest[0] % 2 == 0 else "second"

    def choose(self, annotator: str, key: str, choice: str, reason: str = "") -> bool:
        """Record a choice, and return when it is on disk.

        Args:
            annotator: Name of the annotator.
            key: Id of the pair.
            choice: ``left``, ``right``, ``tie``, ``both_bad`` or ``skip``.
            reason: Why, if the annotator says so.

        Returns:
            Whether the choice is new. A request that is sent again changes nothing.

        Raises:
            ConfigError: There is no such pair.
        """
        if key not in self.pairs:
            raise ConfigError(f"There is no pair {key}.", "Reload the page.")
        left = self.left(self.pairs[key], annotator)
        decided = {"left": left, "right": OTHER[left]}.get(choice, choice)
        earlier = self.choices[key].get(annotator)
        if earlier is not None and (earlier.choice, earlier.reason) == (decided, reason):
            return False
        self._record(Event(key, annotator, decided, left, reason, _now()))
        return True

    def undo(self, annotator: str) -> Pair | None:
        """Take back the last choice of an annotator, and return its pair; None if there is none."""
        made = [event for event in self.journal.events if event.annotator == annotator and event.pair in self.pairs]
        last = next((e.pair for e in reversed(made) if self.choices[e.pair].get(annotator) is e), None)
        if last is None:
            return None
        self._record(Event(last, annotator, UNDO, time=_now()))
        self._shown[last] = annotator
        return self.pairs[last]

    def progress(self, annotator: str) -> dict[str, int]:
        """Count all pairs, those with a label, those that were only skipped, and those done by one annotator."""
        return {
            "total": len(self.pairs),
            "labeled": sum(map(self._is_labeled, self.pairs)),
            "skipped": sum(bool(self.choices[key]) and not self._is_labeled(key) for key in self.pairs),
            "own": sum(annotator in self.choices[key] for key in self.pairs),
        }

    def _is_labeled(self, key: str) -> bool:
        return any(event.choice in DECISIONS for event in self.choices[key].values())

    @property
    def is_complete(self) -> bool:
        """Whether every pair has been labeled or skipped."""
        return all(self.choices[key] for key in self.pairs)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The preference rows of the pairs of this session, as they are in ``preferences.jsonl``."""
        return [row for key in self.choices if key in self.pairs and (row := self._row(key)) is not None]

    def is_shared(self, pair: Pair) -> bool:
        """Return whether every annotator labels a pair."""
        return int(pair.id[:8], 16) < self.overlap * 2**32

    # State

    def _record(self, event: Event) -> None:
        before = self._row(event.pair)
        self.journal.append(event)
        self._apply(event)
        after = self._row(event.pair)
        if before is None and after is not None:
            _append(self.preferences, _line(after))
        elif before != after:
            self._write_preferences()

    def _in_this_order(self, event: Event) -> Event:
        """Return an event as if the file of its session had the responses in the order of this session's file."""
        if event.pair in self.pairs or event.pair not in self._reversed:
            return event
        choice, left = (OTHER.get(name, name) for name in (event.choice, event.left))
        return replace(event, pair=self._reversed[event.pair], choice=choice, left=left)

    def _apply(self, event: Event) -> None:
        choices = self.choices[event.pair]
        if event.choice == UNDO:
            choices.pop(event.annotator, None)
        else:
            choices[event.annotator] = event
        self._shown.pop(event.pair, None)

    def _write_preferences(self) -> None:
        content = b"".join([*self._rows_of_others, *map(_line, self.rows)])
        atomic_write(self.preferences, lambda file: file.write(content))

    def _read_rows_of_others(self) -> list[bytes]:
        """Return the lines of ``preferences.jsonl`` that are choices of an earlier session between other responses."""
        if not self.preferences.is_file():
            return []
        lines = self.preferences.read_bytes().splitlines(keepends=True)
        known = {_texts(pair.prompt, pair.first.text, pair.second.text) for pair in self.pairs.values()}
        complete = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and line.endswith(b"\n")]
        return [line for number, line in complete if self._texts_of_line(number, line) not in known]

    def _texts_of_line(self, number: int, line: bytes) -> tuple[bytes, ...]:
        """Return the texts of a line of ``preferences.jsonl``.

        Raises:
            DataError: The line is not a preference row.
        """
        try:
            row = json.loads(line)
            return _texts(row["prompt"], row["chosen"], row["rejected"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"{self.preferences}:{number}: the line must have prompt, chosen and rejected ({first_line(error)}).",
                f"Remove the line. If it is a choice between the current responses, it is also in {self.journal.path} "
                "and is written again.",
            ) from error

    def _row(self, key: str) -> dict[str, Any] | None:
        """Return the preference row of a pair; None if no response is preferred by most annotators."""
        votes = Counter(event.choice for event in self.choices[key].values())
        if votes["first"] == votes["second"]:
            return None
        pair = self.pairs[key]
        chosen, rejected = pair.first, pair.second
        winner = "first" if votes["first"] > votes["second"] else "second"
        if winner == "second":
            chosen, rejected = rejected, chosen
        supporters = [event for event in self.choices[key].values() if event.choice == winner]
        return {
            "prompt": pair.prompt,
            "chosen": chosen.text,
            "rejected": rejected.text,
            "chosen_model": chosen.model,
            "rejected_model": rejected.model,
            "annotators": [event.annotator for event in supporters],
            "reasons": [event.reason for event in supporters if event.reason],
        }


def _texts(prompt: Any, *responses: str) -> tuple[bytes, ...]:
    """Return the texts of a pair as a file has them, whichever response comes first."""
    return _line({"prompt": prompt}), *sorted(_line({"response": response}) for response in responses)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _append(path: Path, line: bytes) -> None:
    with open(path, "ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
