"""What is wrong with data, as values: one finding per kind of problem and file."""

from dataclasses import dataclass, field

from rlhf.data.records import Demonstration, Preference, Rating, Record, UnpairedPreference, prompt_of

ERROR, WARNING = "error", "warning"


@dataclass
class Finding:
    """A problem of some rows of a file.

    Args:
        level: ``error`` if the data must be fixed before training, otherwise ``warning``.
        text: What is wrong with the rows, as a phrase that can follow their number.
        fix: What to do about it.
        locations: Location of each affected row, with what is particular to it.
    """

    level: str
    text: str
    fix: str = ""
    locations: list[str] = field(default_factory=list)


class Collector:
    """Collects the locations of a problem into one finding per kind, in the order in which the kinds were declared.

    Args:
        kinds: For each kind its level, text and fix.
    """

    def __init__(self, kinds: dict[str, tuple[str, str, str]]) -> None:
        self._findings = {kind: Finding(*described) for kind, described in kinds.items()}

    def add(self, kind: str, location: str) -> None:
        """Add a location to the finding of a kind."""
        self._findings[kind].locations.append(location)

    def findings(self) -> list[Finding]:
        """Return the findings that have a location."""
        return [finding for finding in self._findings.values() if finding.locations]


# Texts of records


def responses_of(record: Record) -> dict[str, str]:
    """Return the responses of a record by field; none for a prompt, whose response is not trained on."""
    if isinstance(record, Preference):
        return {"chosen": record.chosen, "rejected": record.rejected}
    if isinstance(record, Demonstration | Rating | UnpairedPreference):
        return {"response": record.response}
    return {}


def texts_of(record: Record) -> dict[str, str]:
    """Return every text of a record by field: the messages of the prompt, and the responses."""
    messages = prompt_of(record).messages
    names = ["prompt"] if len(messages) == 1 else [f"message {number}" for number in range(1, len(messages) + 1)]
    contents = (message["content"] for message in messages)
    return {**dict(zip(names, contents, strict=True)), **responses_of(record)}
