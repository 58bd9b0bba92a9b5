"""The journal: every choice, on disk before the next pair is shown."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from rlhf.errors import DataError

DECISIONS = ("first", "second", "tie", "both_bad")
CHOICES = (*DECISIONS, "skip")
UNDO = "undo"


@dataclass(frozen=True)
class Event:
    """One line of the journal.

    Args:
        pair: Id of the pair.
        annotator: Name of the annotator.
        choice: ``first``, ``second``, ``tie``, ``both_bad``, ``skip``, or ``undo`` of the annotator's last choice.
        left: Which response was on the left: ``first`` or ``second``.
        reason: Why, if the annotator has said so.
        time: When, in UTC.
    """

    pair: str
    annotator: str
    choice: str
    left: str = "first"
    reason: str = ""
    time: str = ""


class Journal:
    """An append-only JSON Lines file of choices.

    A line that a crash has cut off is dropped when the file is opened.

    Args:
        path: The file. It is created with the first event.

    Raises:
        DataError: A line is not an event.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self.events = list(self._read())

    def append(self, event: Event) -> None:
        """Append an event, and return when it is on disk."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")  # noqa: SIM115  # It stays open for all events.
        self._file.write(json.dumps(asdict(event), ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.events.append(event)

    def _read(self) -> Iterator[Event]:
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            with open(self.path, "r+b") as file:
                file.truncate(len(complete))
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                event = Event(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{self.path}:{number}: the line must be a choice ({error}).", "Remove the line."
                ) from error
            if event.choice not in (*CHOICES, UNDO):
                choices = ", ".join((*CHOICES, UNDO))
                raise DataError(
                    f"{self.path}:{number}: the choice must be one of {choices}, got {event.choice}.",
                    "Remove the line.",
                )
            yield event
