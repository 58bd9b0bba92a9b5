"""Checks of whole rows: invalid, mixed, empty, duplicate and contradictory rows, and rows in more than one split.

Each check takes linear time: rows are compared through dictionaries, not in pairs.
"""

import re
from collections.abc import Hashable

from rlhf.data.forms import FORMS
from rlhf.data.hints import parses
from rlhf.data.parser import RecordParser
from rlhf.data.records import Preference, Prompt, Rating, Record, UnpairedPreference, prompt_of
from rlhf.doctor.findings import ERROR, WARNING, Collector, Finding, responses_of, texts_of
from rlhf.doctor.forms import Split


def invalid_rows(split: Split) -> list[Finding]:
    """Find rows that are not valid records, one finding per reason."""
    found: dict[str, Finding] = {}
    for row in split.invalid:
        reason = re.split(r" \(|, got ", row.reason)[0]  # The rest differs from row to row.
        fix = f"If the field has another name: data.columns.{row.missing}=<column>" if row.missing else ""
        finding = found.setdefault(reason, Finding(ERROR, f"invalid: {reason}", fix))
        finding.locations.append(split.location(row.number) + row.reason[len(reason) :])
    return list(found.values())


def mixed_forms(split: Split, parser: RecordParser) -> list[Finding]:
    """Find rows that a stage rejects because most rows of the file have another form."""
    if len(split.by_form()) < 2 or next(iter(split.by_form())) is Prompt:  # The prompt of every form can be read.
        return []
    main, *others = split.by_form()
    findings = []
    for form in others:
        entries = [entry for entry in split.by_form()[form] if not parses(parser, entry.row, main)]
        name, readers = FORMS[main]
        fix = f"Use one file per form. Only the prompts of this file can be read as it is ({FORMS[Prompt][1]})."
        text = f"{FORMS[form][0]}, but most rows are {name}: {readers} would reject them"
        findings.append(Finding(ERROR, text, fix, [split.location(entry.number) for entry in entries]))
    return [finding for finding in findings if finding.locations]


def empty_texts(split: Split) -> list[Finding]:
    """Find responses and messages without any text. An empty prompt or demonstration is an invalid row."""
    found = Collector(
        {
            "response": (ERROR, "an empty response", "Remove the rows, or fill in the response."),
            "message": (
                WARNING,
                "an empty message in the prompt",
                "Remove the message if the model should not see it.",
            ),
        }
    )
    for entry in split.entries:
        responses = responses_of(entry.record)
        for name, text in texts_of(entry.record).items():
            if not text.strip():
                found.add("response" if name in responses else "message", f"{split.location(entry.number)} ({name})")
    return found.findings()


def duplicates(split: Split) -> list[Finding]:
    """Find rows that repeat an earlier row exactly."""
    fix = "Remove the copies, unless these rows should count more than others."
    found = Finding(WARNING, "exact copies of an earlier row", fix)
    first: dict[Hashable, int] = {}
    for entry in split.entries:
        number = first.setdefault(_identity(entry.record), entry.number)
        if number != entry.number:
            found.locations.append(f"{split.location(entry.number)} (as {split.short_location(number)})")
    return [found] if found.locations else []


def contradictions(split: Split) -> list[Finding]:
    """Find rows that say the opposite of an earlier row about the same prompt and responses."""
    remove = "Keep one row of each pair, or remove both."
    found = Collector(
        {
            "Preference": (ERROR, "an earlier pair with 'chosen' and 'rejected' swapped", remove),
            "UnpairedPreference": (ERROR, "an earlier prompt and response with the other label", remove),
            "Rating": (WARNING, "an earlier prompt and response with another reward", "Use their mean, or keep one."),
        }
    )
    claims: dict[Hashable, dict[Hashable, int]] = {}
    for entry in split.entries:
        claim = _claim(entry.record)
        if claim is None:
            continue
        earlier = claims.setdefault(_content(entry.record), {})
        if other := next((number for said, number in earlier.items() if said != claim), None):
            found.add(
                type(entry.record).__name__,
                f"{split.location(entry.number)} (contradicts {split.short_location(other)})",
            )
        earlier.setdefault(claim, entry.number)
    return found.findings()


def overlap(train: Split, held_out: Split) -> list[Finding]:
    """Find rows of the validation or test data that the model is trained on, or whose prompt it is trained on."""
    where = f"the training data ({train.path})"
    found = Collector(
        {
            "row": (ERROR, f"also in {where}", "Remove these rows from one of the files."),
            "prompt": (WARNING, f"a prompt that is also in {where}", "For an unbiased comparison, use new prompts."),
        }
    )
    contents: dict[Hashable, int] = {}
    prompts: dict[str, int] = {}
    for entry in train.entries:
        contents.setdefault(_content(entry.record), entry.number)
        prompts.setdefault(prompt_of(entry.record).raw_text, entry.number)
    for entry in held_out.entries:
        same_row, same_prompt = contents.get(_content(entry.record)), prompts.get(prompt_of(entry.record).raw_text)
        if (number := same_row or same_prompt) is not None:
            kind = "prompt" if same_row is None else "row"
            found.add(kind, f"{held_out.location(entry.number)} (as in {train.location(number)})")
    return found.findings()


def _content(record: Record) -> tuple[Hashable, ...]:
    """Return what identifies the texts of a record, whatever their preference, label or reward."""
    return type(record).__name__, prompt_of(record).raw_text, frozenset(responses_of(record).values())


def _claim(record: Record) -> Hashable:
    """Return the preference, label or reward of a record; None if no other record could contradict it."""
    if isinstance(record, Preference):
        return record.chosen
    if isinstance(record, Rating):
        return record.reward
    return record.desirable if isinstance(record, UnpairedPreference) else None


def _identity(record: Record) -> Hashable:
    target = record.target if isinstance(record, Prompt) else None
    return *_content(record), _claim(record), getattr(record, "margin", None), target
