"""Every form of a row, and what is said of a row that has none."""

from typing import Any

import pytest

from rlhf.data.records import (
    FIELDS,
    Demonstration,
    Preference,
    Prompt,
    Rating,
    RecordError,
    RecordParser,
    UnpairedPreference,
)
from rlhf.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
ASKED = Prompt([USER], "Q")
TALK = [USER, ASSISTANT, {"role": "user", "content": "R"}]
TALKED = Prompt(TALK, "user: Q\n\nassistant: A\n\nuser: R")
SPEECH = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant:"


def answered(text: str) -> list[dict[str, str]]:
    return [*TALK, {"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"document": "Q", "target": "A"}, Demonstration(ASKED, "A")),
        ({"prompt": "Q", "completion": "A"}, Demonstration(ASKED, "A")),
        ({"prompt": "Q", "target": "A"}, Demonstration(ASKED, "A")),
        ({"messages": [USER, ASSISTANT]}, Demonstration(ASKED, "A")),
        ({"messages": answered("B")}, Demonstration(TALKED, "B")),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Demonstration(ASKED, "A")),
        ({"prompt": TALK, "completion": "B"}, Demonstration(TALKED, "B")),
        # libraries that read tables fill the fields a row does not have with None
        ({"document": None, "prompt": "Q", "completion": "A", "messages": None}, Demonstration(ASKED, "A")),
        ({"prompt": "Q", "completion": " A\n"}, Demonstration(ASKED, " A\n")),
    ],
)
def test_demonstrations(row: dict[str, Any], expected: Demonstration) -> None:
    assert RecordParser().read(row, Demonstration) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, Preference(ASKED, "A", "B", 0.0)),
        ({"document": "Q", "chosen": "A", "rejected": "B", "margin": 1.5}, Preference(ASKED, "A", "B", 1.5)),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 2}, Preference(ASKED, "A", "B", 2.0)),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": None}, Preference(ASKED, "A", "B", 0.0)),
        (
            {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "B"}]},
            Preference(ASKED, "A", "B"),
        ),
        ({"chosen": answered("C"), "rejected": answered("D")}, Preference(TALKED, "C", "D")),
        ({"chosen": SPEECH + " C", "rejected": SPEECH + " D"}, Preference(TALKED, "C", "D")),
        ({"chosen": SPEECH + " C", "rejected": SPEECH}, Preference(TALKED, "C", "")),  # HH has empty answers
    ],
)
def test_preferences(row: dict[str, Any], expected: Preference) -> None:
    assert RecordParser().read(row, Preference) == expected


def test_transcripts_keep_the_lines_within_a_turn() -> None:
    """Only a blank line before a speaker's name starts a turn; 'Human:' inside a line is what somebody said."""
    opening = "\n\nHuman: one\n\ntwo Human: x\n\nAssistant:"
    pair = RecordParser().read({"chosen": opening + " a\n\nb", "rejected": opening + " c"}, Preference)
    assert pair.prompt.messages == [{"role": "user", "content": "one\n\ntwo Human: x"}]
    assert (pair.chosen, pair.rejected) == ("a\n\nb", "c")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "response": "A", "reward": 0.5}, Rating(ASKED, "A", 0.5)),
        ({"document": "Q", "response": "A", "reward": -2}, Rating(ASKED, "A", -2.0)),
        ({"prompt": TALK, "response": [ASSISTANT], "reward": 0}, Rating(TALKED, "A", 0.0)),
    ],
)
def test_ratings(row: dict[str, Any], expected: Rating) -> None:
    assert RecordParser().read(row, Rating) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "completion": "A", "label": True}, UnpairedPreference(ASKED, "A", True)),
        ({"document": "Q", "response": "A", "label": False}, UnpairedPreference(ASKED, "A", False)),
        ({"prompt": TALK, "completion": [ASSISTANT], "label": 1}, UnpairedPreference(TALKED, "A", True)),
        ({"prompt": "Q", "response": "A", "completion": None, "label": 0}, UnpairedPreference(ASKED, "A", False)),
    ],
)
def test_verdicts(row: dict[str, Any], expected: UnpairedPreference) -> None:
    assert RecordParser().read(row, UnpairedPreference) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q"}, ASKED),
        ({"document": "Q"}, ASKED),
        ({"document": "Q", "target": "A"}, Prompt([USER], "Q", "A")),
        ({"prompt": "Q", "completion": "A"}, Prompt([USER], "Q", "A")),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, Prompt([USER], "Q", "A")),
        ({"prompt": "Q", "response": "A", "reward": 1.0}, ASKED),  # what was rated is no target
        ({"prompt": TALK}, TALKED),
        ({"messages": TALK}, TALKED),
        ({"messages": answered("B")}, Prompt(TALK, TALKED.raw_text, "B")),
        ({"chosen": SPEECH + " C", "rejected": SPEECH + " D"}, Prompt(TALK, TALKED.raw_text, "C")),
    ],
)
def test_prompts_of_any_form(row: dict[str, Any], expected: Prompt) -> None:
    assert RecordParser().read(row, Prompt) == expected


@pytest.mark.parametrize(
    ("columns", "row", "form", "expected"),
    [
        (
            {"prompt": "q", "rejected": "loser"},
            {"q": "Q", "chosen": "A", "loser": "B"},
            Preference,
            Preference(ASKED, "A", "B"),
        ),
        ({"document": "body", "target": "tldr"}, {"body": "Q", "tldr": "A"}, Demonstration, Demonstration(ASKED, "A")),
        ({"messages": "turns"}, {"turns": [USER, ASSISTANT]}, Demonstration, Demonstration(ASKED, "A")),
        (
            {"chosen": "good", "rejected": "bad"},
            {"good": SPEECH + " C", "bad": SPEECH + " D"},
            Preference,
            Preference(TALKED, "C", "D"),
        ),
        (
            {"response": "text", "reward": "stars"},
            {"prompt": "Q", "text": "A", "stars": 5},
            Rating,
            Rating(ASKED, "A", 5.0),
        ),
        (
            {"margin": "gap"},
            {"prompt": "Q", "chosen": "A", "rejected": "B", "gap": 3, "margin": 9},
            Preference,
            Preference(ASKED, "A", "B", 3.0),
        ),
        # the data's own 'prompt' is something else, and is not read
        ({"prompt": "q"}, {"prompt": "system text", "q": "Q"}, Prompt, ASKED),
    ],
)
def test_columns_rename_fields(columns: dict[str, str], row: dict[str, Any], form: type, expected: Any) -> None:
    assert RecordParser(columns).read(row, form) == expected


@pytest.mark.parametrize(
    ("row", "form", "reason", "missing"),
    [
        (
            {"prompt": "Q", "chosen": "A", "loser": "B"},
            Preference,
            "preference record has no 'rejected'; its fields are 'prompt', 'chosen', 'loser'",
            "rejected",
        ),
        (
            {"prompt": "Q", "rejected": "B", "chosen": None},
            Preference,
            "preference record has no 'chosen'; its fields are 'prompt', 'rejected'",
            "chosen",
        ),
        ({"chosen": "A", "rejected": "B"}, Preference, "has no 'prompt'", "prompt"),
        ({"prompt": "Q"}, Demonstration, "demonstration record has no 'target'", "target"),
        ({"target": "A"}, Demonstration, "demonstration record has no 'prompt'", "prompt"),
        ({"prompt": "Q", "response": "A"}, Rating, "rating record has no 'reward'", "reward"),
        ({"prompt": "Q", "reward": 1}, Rating, "rating record has no 'response'", "response"),
        ({"text": "Q"}, Prompt, "prompt record has no 'prompt'; its fields are 'text'", "prompt"),
        ({}, Prompt, "its fields are none", "prompt"),
        ({"prompt": " \n", "target": "A"}, Demonstration, "field 'prompt' is empty", None),
        ({"document": "", "target": "A"}, Demonstration, "field 'document' is empty", None),
        ({"prompt": "Q", "target": "  "}, Demonstration, "the answer is empty", None),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, Demonstration, "the answer is empty", None),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, Preference, "the same text", None),
        ({"prompt": 7, "target": "A"}, Demonstration, "'prompt' is neither text nor a list of messages", None),
        ({"prompt": [], "target": "A"}, Demonstration, "'prompt' is neither text nor a list of messages", None),
        ({"prompt": "Q", "chosen": {"a": 1}, "rejected": "A"}, Preference, "'chosen' is neither text nor a list", None),
        ({"messages": "hello"}, Demonstration, "'messages' is neither text nor a list", None),
        ({"messages": [{"role": "user"}]}, Demonstration, "a message needs 'role' and 'content'", None),
        ({"messages": [{"from": "human", "value": "Q"}]}, Demonstration, "a message needs 'role' and 'content'", None),
        ({"messages": ["Q", "A"]}, Demonstration, "a message needs 'role' and 'content'", None),
        ({"messages": [USER]}, Demonstration, "'messages' does not end with an answer", None),
        ({"messages": [ASSISTANT]}, Demonstration, "does not end with the user", None),
        ({"prompt": [USER, ASSISTANT], "target": "A"}, Demonstration, "does not end with the user", None),
        ({"chosen": [USER, ASSISTANT], "rejected": answered("D")}, Preference, "do not share a prompt", None),
        ({"chosen": SPEECH + " C", "rejected": "\n\nHuman: X\n\nAssistant: D"}, Preference, "do not share", None),
        ({"prompt": "Q", "response": "A", "reward": "good"}, Rating, "'reward' is 'good', not a finite number", None),
        ({"prompt": "Q", "response": "A", "reward": float("nan")}, Rating, "'reward' is nan, not a finite", None),
        ({"prompt": "Q", "response": "A", "reward": True}, Rating, "'reward' is True, not a finite number", None),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": "big"}, Preference, "'margin' is 'big'", None),
        ({"prompt": "Q", "completion": "A"}, UnpairedPreference, "unpaired record has no 'label'", "label"),
        ({"prompt": "Q", "label": True}, UnpairedPreference, "unpaired record has no 'completion'", "completion"),
        (
            {"prompt": "Q", "completion": "A", "label": "yes"},
            UnpairedPreference,
            "'label' is 'yes', neither true nor",
            None,
        ),
        (
            {"prompt": "Q", "completion": "A", "label": -1},
            UnpairedPreference,
            "'label' is -1, neither true nor false",
            None,
        ),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: dict[str, Any], form: type, reason: str, missing: str | None) -> None:
    """The reason names the field as the data call it; ``missing`` is the key of data.columns."""
    with pytest.raises(RecordError) as caught:
        RecordParser().read(row, form)
    assert reason in str(caught.value)
    assert caught.value.missing == missing


def test_a_field_without_a_new_name_keeps_its_own() -> None:
    """``None`` stands for the field's own name, as in the configuration; other fields are renamed."""
    reader = RecordParser({**dict.fromkeys(FIELDS), "rejected": "loser"})
    row = {"prompt": "Q", "chosen": "A", "loser": "B", "rejected": "C"}
    assert reader.read(row, Preference) == Preference(ASKED, "A", "B")


@pytest.mark.parametrize(
    ("columns", "fix"),
    [
        ({"reject": "loser"}, r"data\.columns\.<field>=reject"),
        ({"loser": "rejected"}, r"data\.columns\.rejected=loser"),
        ({"reject": None}, r"data\.columns\.<field>=reject"),
    ],
    ids=["unknown", "the wrong way round", "unknown and null"],
)
def test_an_unknown_field_name_is_refused(columns: dict[str, str | None], fix: str) -> None:
    """The message names the key, its value, the fields there are, and what to type."""
    ((name, column),) = columns.items()
    message = rf"^data\.columns\.{name}={column}: '{name}' is not a field .* prompt, document, .*, label, .*\n  {fix}$"
    with pytest.raises(UserError, match=message):
        RecordParser({"prompt": "Q", **columns})


def test_a_renamed_field_that_is_missing_goes_by_the_name_in_the_data() -> None:
    with pytest.raises(RecordError, match="no 'loser'; its fields are 'prompt', 'chosen'") as caught:
        RecordParser({"rejected": "loser"}).read({"prompt": "Q", "chosen": "A"}, Preference)
    assert caught.value.missing == "rejected"


@pytest.mark.parametrize(
    ("columns", "row", "form", "name"),
    [
        ({"prompt": "q"}, {"q": "", "target": "A"}, Demonstration, "q"),
        ({"reward": "stars"}, {"prompt": "Q", "response": "A", "stars": "five"}, Rating, "stars"),
        ({"messages": "turns"}, {"turns": 3}, Demonstration, "turns"),
        ({"label": "good"}, {"prompt": "Q", "completion": "A", "good": 0.5}, UnpairedPreference, "good"),
    ],
)
def test_a_renamed_field_that_is_wrong_goes_by_the_name_in_the_data(
    columns: dict[str, str], row: dict[str, Any], form: type, name: str
) -> None:
    with pytest.raises(RecordError, match=f"field '{name}'"):
        RecordParser(columns).read(row, form)
