"""Invalid, mixed, empty, duplicate and contradictory rows, and rows in more than one split."""

from collections.abc import Callable
from typing import Any

import pytest

from rlhf.data.parser import RecordParser
from rlhf.doctor.findings import ERROR, WARNING, Finding
from rlhf.doctor.forms import Split
from rlhf.doctor.rows import contradictions, duplicates, empty_texts, invalid_rows, mixed_forms, overlap

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
SWAPPED = {"prompt": "a", "chosen": "c", "rejected": "b"}
DEMONSTRATION = {"prompt": "a", "completion": "b"}
PROMPT = {"prompt": "a"}


def summary(findings: list[Finding]) -> list[tuple[str, list[str]]]:
    """Return level and locations of each finding, without the directory of the file."""
    return [(finding.level, [location.rpartition("/")[2] for location in finding.locations]) for finding in findings]


def test_invalid_rows_are_grouped_by_reason(split: Callable[..., Split]) -> None:
    """The fields of a row are not part of the reason."""
    one, two = {"prompt": "a", "chosen": "b", "loser": "c"}, {"prompt": "a", "chosen": "b", "bad": "c"}
    found = invalid_rows(split(one, PAIR, two, b"{\n"))
    assert [finding.text for finding in found] == [
        "invalid: the preference record has no field 'rejected'",
        "invalid: the line is not JSON",
    ]
    assert found[0].locations[1].endswith("train.jsonl:3 (fields: prompt, chosen, bad)")
    assert "data.columns.rejected=<column>" in found[0].fix
    assert [finding.level for finding in found] == [ERROR, ERROR]


def test_a_null_field_needs_no_other_name(split: Callable[..., Split]) -> None:
    (found,) = invalid_rows(split({"prompt": "a", "chosen": "b", "rejected": None}))
    assert (found.text, found.fix) == ("invalid: the field 'rejected' of the preference record is null", "")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([PAIR, PAIR], []),
        ([PAIR, PAIR, PROMPT], [(ERROR, ["train.jsonl:3"])]),
        ([PROMPT, PROMPT, PAIR], []),  # Stages that read prompts read those of pairs, too.
        ([DEMONSTRATION, DEMONSTRATION, {**PAIR, **DEMONSTRATION}], []),  # has the fields of both forms
        ([PAIR, PAIR, DEMONSTRATION, PROMPT], [(ERROR, ["train.jsonl:3"]), (ERROR, ["train.jsonl:4"])]),
    ],
)
def test_rows_of_another_form_than_most_are_errors(split: Callable[..., Split], rows: list[Any], expected: Any) -> None:
    assert summary(mixed_forms(split(*rows), RecordParser())) == expected


def test_empty_responses_are_errors_and_empty_messages_are_warnings(split: Callable[..., Split]) -> None:
    conversation = [{"role": "system", "content": " "}, {"role": "user", "content": "a"}]
    rows = PAIR, {**PAIR, "rejected": " \n"}, {"prompt": conversation, "response": "", "reward": 1}
    found = empty_texts(split(*rows))
    assert summary(found) == [
        (ERROR, ["train.jsonl:2 (rejected)", "train.jsonl:3 (response)"]),
        (WARNING, ["train.jsonl:3 (message 1)"]),
    ]


def test_exact_copies_are_warnings(split: Callable[..., Split]) -> None:
    """A copy has the same prompt, responses, label, reward and margin; other fields do not count."""
    rated = {"prompt": "a", "response": "b", "reward": 1.0}
    rows = PAIR, {**PAIR, "id": 7}, {**PAIR, "margin": 2.0}, SWAPPED, rated, {**rated, "reward": 2.0}, PROMPT, PROMPT
    assert summary(duplicates(split(*rows))) == [
        (WARNING, ["train.jsonl:2 (as line 1)", "train.jsonl:8 (as line 7)"]),
    ]


def test_contradictions(split: Callable[..., Split]) -> None:
    """Swapped pairs and both labels are errors; two rewards may come from two raters."""
    labeled = {"prompt": "a", "completion": "b", "label": True}
    rated = {"prompt": "a", "response": "b", "reward": 1.0}
    rows = PAIR, labeled, rated, SWAPPED, {**labeled, "label": False}, {**rated, "reward": 2.0}, PAIR
    assert summary(contradictions(split(*rows))) == [
        (ERROR, ["train.jsonl:4 (contradicts line 1)", "train.jsonl:7 (contradicts line 4)"]),
        (ERROR, ["train.jsonl:5 (contradicts line 2)"]),
        (WARNING, ["train.jsonl:6 (contradicts line 3)"]),
    ]
    others = PAIR, {**SWAPPED, "prompt": "d"}, {**PAIR, "rejected": "d"}, labeled, {**labeled, "completion": "c"}
    assert contradictions(split(*others, DEMONSTRATION, {**DEMONSTRATION, "completion": "c"})) == []


def test_validation_rows_in_the_training_data(split: Callable[..., Split]) -> None:
    """The same prompt with the same responses is an error, whatever the label; the same prompt is a warning."""
    train = split(PAIR, DEMONSTRATION)
    new = {**PAIR, "prompt": "new"}
    val = split(
        SWAPPED, {**PAIR, "rejected": "d"}, new, {**DEMONSTRATION, "completion": "d"}, DEMONSTRATION, name="val"
    )
    assert summary(overlap(train, val)) == [
        (ERROR, ["train.jsonl:1)", "train.jsonl:2)"]),
        (WARNING, ["train.jsonl:1)", "train.jsonl:1)"]),
    ]
    (rows, prompts) = overlap(train, val)
    locations = [*rows.locations, *prompts.locations]
    assert [int(location.split(" (")[0].rpartition(":")[2]) for location in locations] == [1, 5, 2, 4]
    assert overlap(split(PAIR), split(new, name="val")) == []
