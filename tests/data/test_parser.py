"""Every kind of row that is recognized, and the error for a row that is not valid."""

from typing import Any

import pytest

from rlhf.data.forms import form_of
from rlhf.data.parser import RecordParser
from rlhf.data.records import (
    FIELDS,
    Demonstration,
    Preference,
    Prompt,
    Rating,
    RecordError,
    UnpairedPreference,
    prompt_of,
)
from rlhf.errors import ConfigError

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TEXT = {"type": "text", "text": "A"}
PROMPT = Prompt([USER], "Q")
CONVERSATION = [USER, ASSISTANT, {"role": "user", "content": "R"}]
LONG_PROMPT = Prompt(CONVERSATION, "user: Q\n\nassistant: A\n\nuser: R")
TRANSCRIPT = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant:"


def ending_with(text: str) -> list[dict[str, str]]:
    return [*CONVERSATION, {"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"document": "Q", "target": "A"}, Demonstration(PROMPT, "A")),
        ({"prompt": "Q", "completion": "A"}, Demonstration(PROMPT, "A")),
        ({"prompt": "Q", "target": "A"}, Demonstration(PROMPT, "A")),
        ({"messages": [USER, ASSISTANT]}, Demonstration(PROMPT, "A")),
        ({"messages": ending_with("B")}, Demonstration(LONG_PROMPT, "B")),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Demonstration(PROMPT, "A")),
        ({"prompt": CONVERSATION, "completion": "B"}, Demonstration(LONG_PROMPT, "B")),
        # The datasets library fills columns that a row does not use with None.
        ({"document": None, "prompt": "Q", "completion": "A", "messages": None}, Demonstration(PROMPT, "A")),
        ({"prompt": "Q", "completion": " A\n"}, Demonstration(PROMPT, " A\n")),
        ({"prompt": "Q", "completion": 0.5}, Demonstration(PROMPT, "0.5")),
        ({"prompt": "Q", "completion": 10**400}, Demonstration(PROMPT, "1" + "0" * 400)),
        ({"instruction": "Q", "input": "", "output": "A"}, Demonstration(PROMPT, "A")),  # Alpaca
        (
            {"messages": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            Demonstration(PROMPT, "A"),
        ),  # ShareGPT
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": [TEXT, {**TEXT, "text": "!", "image": None}]},
                ]
            },
            Demonstration(PROMPT, "A!"),
        ),
    ],
)
def test_demonstrations(row: dict[str, Any], expected: Demonstration) -> None:
    assert RecordParser().parse(row, Demonstration) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, Preference(PROMPT, "A", "B", 0.0)),
        ({"document": "Q", "chosen": "A", "rejected": "B", "margin": 1.5}, Preference(PROMPT, "A", "B", 1.5)),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 2}, Preference(PROMPT, "A", "B", 2.0)),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": None}, Preference(PROMPT, "A", "B", 0.0)),
        (
            {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "B"}]},
            Preference(PROMPT, "A", "B"),
        ),
        ({"chosen": ending_with("C"), "rejected": ending_with("D")}, Preference(LONG_PROMPT, "C", "D")),
        ({"chosen": TRANSCRIPT + " C", "rejected": TRANSCRIPT + " D"}, Preference(LONG_PROMPT, "C", "D")),
        (
            {"chosen": TRANSCRIPT + " C", "rejected": TRANSCRIPT},
            Preference(LONG_PROMPT, "C", ""),
        ),  # HH contains empty responses
    ],
)
def test_preferences(row: dict[str, Any], expected: Preference) -> None:
    assert RecordParser().parse(row, Preference) == expected


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("User", "user"),
        ("prompter", "user"),  # OpenAssistant
        ("chatgpt", "assistant"),
        ("Model", "assistant"),
        ("developer", "system"),  # OpenAI
        ("tool", "tool"),
        ("iPython", "iPython"),
    ],
)
def test_roles_of_other_formats_are_mapped(role: str, expected: str) -> None:
    """Roles that are not known reach the chat template as they are."""
    messages = [{"role": role, "content": "Q"}, USER, ASSISTANT]
    assert RecordParser().parse({"messages": messages}, Demonstration).prompt.messages[0]["role"] == expected
    assert form_of(RecordParser(), {"messages": messages[:1]}) is (
        Demonstration if expected in ("assistant", "iPython") else Prompt
    )


def test_the_input_of_alpaca_follows_its_instruction() -> None:
    row = {"instruction": "Shorten it.", "input": "A long text.", "output": "A."}
    assert RecordParser().parse(row, Demonstration).prompt.raw_text == "Shorten it.\n\nA long text."


SYSTEM = {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    ("columns", "row", "record_type", "expected"),
    [
        ({"prompt": "q"}, {"system": "S", "q": "Q", "chosen": "A", "rejected": "B"}, Preference, [SYSTEM, USER]),
        ({}, {"system_prompt": "S", "system": "", "prompt": "Q"}, Prompt, [SYSTEM, USER]),
        ({}, {"system": "S", "messages": [USER, ASSISTANT]}, Demonstration, [SYSTEM, USER]),
        ({}, {"system": "T", "messages": [SYSTEM, USER, ASSISTANT]}, Demonstration, [SYSTEM, USER]),
        ({}, {"system": "S", "prompt": "Q", "target": [USER, ASSISTANT]}, Demonstration, [SYSTEM, USER]),
        ({}, {"system": " ", "system_prompt": None, "prompt": "Q"}, Prompt, [USER]),
        ({"prompt": "system"}, {"system": "Q"}, Prompt, [USER]),
        (
            {},
            {"system": "S", "instruction": "R", "input": "", "output": "B", "history": [["Q", "A"]]},
            Demonstration,
            [SYSTEM, *CONVERSATION],
        ),
        ({}, {"history": [USER, {"from": "gpt", "value": "A"}], "prompt": "R"}, Prompt, CONVERSATION),
        ({"system": "persona"}, {"persona": "S", "system": "T", "prompt": "Q"}, Prompt, [SYSTEM, USER]),
        ({"system": "persona"}, {"persona": "S", "instruction": "Q", "output": "A"}, Demonstration, [SYSTEM, USER]),
        ({"history": "turns"}, {"turns": [["Q", "A"]], "history": ["T"], "prompt": "R"}, Prompt, CONVERSATION),
        ({"system": "", "history": ""}, {"system": "S", "history": ["T"], "prompt": "Q"}, Prompt, [USER]),
        ({"prompt": "history"}, {"history": "Q"}, Prompt, [USER]),
        ({}, {"history": [], "prompt": "Q"}, Prompt, [USER]),
        ({}, {"history": "of Rome", "prompt": "Q"}, Prompt, [USER]),
    ],
)
def test_the_system_prompt_and_the_history_of_a_row_precede_its_prompt(
    columns: dict[str, str], row: dict[str, Any], record_type: type, expected: list[dict[str, str]]
) -> None:
    assert prompt_of(RecordParser(columns).parse(row, record_type)).messages == expected


@pytest.mark.parametrize("history", [["Q", "A"], [["Q"]], [["Q", None]], [{"user": "Q", "bot": "A"}]])
def test_a_history_of_another_form_is_refused(history: list[Any]) -> None:
    """Who speaks is not known. The suggested column is not one of the data, so the field is ignored."""
    reason = "^the field 'history' must be a list of messages, or of pairs of a user message and a response, got "
    with pytest.raises(RecordError, match=reason) as error:
        RecordParser().parse({"history": history, "prompt": "Q"}, Prompt)
    assert error.value.fix == "To ignore the field: data.columns.history="
    assert RecordParser({"history": ""}).parse({"history": history, "prompt": "Q"}, Prompt) == PROMPT


def test_a_transcript_keeps_the_lines_within_a_turn() -> None:
    """A turn starts with a blank line and a role. 'Human:' within a line is part of the text."""
    opening = "\n\nHuman: one\n\ntwo Human: x\n\nAssistant:"
    pair = RecordParser().parse({"chosen": opening + " a\n\nb", "rejected": opening + " c"}, Preference)
    assert pair.prompt.messages == [{"role": "user", "content": "one\n\ntwo Human: x"}]
    assert (pair.chosen, pair.rejected) == ("a\n\nb", "c")


def test_the_first_turn_of_a_transcript_needs_no_blank_line() -> None:
    """The row that starts with 'Human:' is the same pair as the one that starts with a blank line."""
    row = {"chosen": TRANSCRIPT + " C", "rejected": TRANSCRIPT + " D"}
    stripped = {name: text.strip() for name, text in row.items()}
    assert RecordParser().parse(stripped, Preference) == Preference(LONG_PROMPT, "C", "D")


@pytest.mark.parametrize(
    ("row", "record_type", "expected"),
    [
        ({"prompt": TRANSCRIPT, "chosen": " C", "rejected": " D\n"}, Preference, Preference(LONG_PROMPT, "C", "D")),
        ({"document": TRANSCRIPT.lstrip() + " ", "target": " C"}, Demonstration, Demonstration(LONG_PROMPT, "C")),
        ({"prompt": TRANSCRIPT, "response": " C", "reward": 1}, Rating, Rating(LONG_PROMPT, "C", 1.0)),
        ({"prompt": TRANSCRIPT, "completion": " C"}, Prompt, Prompt(CONVERSATION, LONG_PROMPT.raw_text, "C")),
        (
            {"prompt": "\n\nHuman: Q\n\nAssistant:", "completion": " A", "label": True},
            UnpairedPreference,
            UnpairedPreference(PROMPT, "A", True),
        ),
    ],
)
def test_a_prompt_may_be_a_transcript(row: dict[str, Any], record_type: type, expected: Any) -> None:
    """Dahoas/rm-static has this form. As text, the prompt would have the template around it as well."""
    assert RecordParser().parse(row, record_type) == expected


@pytest.mark.parametrize(
    "text", ["Human: Q\nAssistant:", "Human: Q\n\nAssistant: A", "Q\n\nAssistant:", "Dear Human: Q\n\nAssistant:"]
)
def test_other_texts_are_not_transcripts(text: str) -> None:
    demonstration = RecordParser().parse({"prompt": text, "completion": " A"}, Demonstration)
    assert demonstration == Demonstration(Prompt([{"role": "user", "content": text}], text), " A")


def test_text_before_the_first_turn_of_a_transcript_is_refused() -> None:
    row = {"good": "Be kind." + TRANSCRIPT + " C", "rejected": TRANSCRIPT + " D"}
    with pytest.raises(
        RecordError, match=r"^the field 'good' contains text before its first turn: 'Be kind\.'$"
    ) as error:
        RecordParser({"chosen": "good"}).parse(row, Preference)
    assert error.value.fix == "Begin the transcript with 'Human:'."


def test_a_response_may_be_a_transcript_that_repeats_the_prompt() -> None:
    """The response is the last message."""
    pair = {"prompt": CONVERSATION, "chosen": ending_with("C"), "rejected": ending_with("D")}
    assert RecordParser().parse(pair, Preference) == Preference(LONG_PROMPT, "C", "D")
    assert RecordParser().parse({"prompt": "Q", "target": [USER, ASSISTANT]}, Demonstration).response == "A"


@pytest.mark.parametrize(
    ("row", "record_type", "name", "count", "prompt", "different", "fix"),
    [
        (
            {"prompt": "Q", "chosen": ending_with("C"), "rejected": ending_with("D")},
            Preference,
            "chosen",
            4,
            "1 of the field 'prompt'",
            2,
            "To use the complete conversations, remove the field 'prompt'.",
        ),
        (
            {"document": CONVERSATION, "completion": [USER, ASSISTANT]},
            Demonstration,
            "completion",
            2,
            "3 of the field 'document'",
            2,
            "Write only the response to the field 'completion'.",
        ),
        (
            {"prompt": "R", "response": [USER, ASSISTANT], "reward": 1},
            Rating,
            "response",
            2,
            "1 of the field 'prompt'",
            1,
            "Write only the response to the field 'response'.",
        ),
    ],
    ids=["longer", "shorter", "another message"],
)
def test_a_transcript_of_another_prompt_is_refused(
    row: dict[str, Any], record_type: type, name: str, count: int, prompt: str, different: int, fix: str
) -> None:
    """The error states which message is the first that differs, from 1."""
    with pytest.raises(RecordError) as error:
        RecordParser().parse(row, record_type)
    assert str(error.value) == (
        f"the field '{name}' has {count} messages, but those before the last one are not the {prompt}: message "
        f"{different} differs"
    )
    assert error.value.fix == fix


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "response": "A", "reward": 0.5}, Rating(PROMPT, "A", 0.5)),
        ({"document": "Q", "response": "A", "reward": -2}, Rating(PROMPT, "A", -2.0)),
        ({"prompt": CONVERSATION, "response": [ASSISTANT], "reward": 0}, Rating(LONG_PROMPT, "A", 0.0)),
    ],
)
def test_ratings(row: dict[str, Any], expected: Rating) -> None:
    assert RecordParser().parse(row, Rating) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "completion": "A", "label": True}, UnpairedPreference(PROMPT, "A", True)),
        ({"document": "Q", "response": "A", "label": False}, UnpairedPreference(PROMPT, "A", False)),
        ({"prompt": CONVERSATION, "completion": [ASSISTANT], "label": 1}, UnpairedPreference(LONG_PROMPT, "A", True)),
        ({"prompt": "Q", "response": "A", "completion": None, "label": 0}, UnpairedPreference(PROMPT, "A", False)),
    ],
)
def test_unpaired_preferences(row: dict[str, Any], expected: UnpairedPreference) -> None:
    assert RecordParser().parse(row, UnpairedPreference) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q"}, PROMPT),
        ({"document": "Q"}, PROMPT),
        ({"document": "Q", "target": "A"}, Prompt([USER], "Q", "A")),
        ({"prompt": "Q", "completion": "A"}, Prompt([USER], "Q", "A")),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, Prompt([USER], "Q", "A")),
        ({"prompt": "Q", "response": "A", "reward": 1.0}, PROMPT),  # a rated response is not a target
        ({"prompt": CONVERSATION}, LONG_PROMPT),
        ({"messages": CONVERSATION}, LONG_PROMPT),
        ({"messages": ending_with("B")}, Prompt(CONVERSATION, LONG_PROMPT.raw_text, "B")),
        ({"chosen": TRANSCRIPT + " C", "rejected": TRANSCRIPT + " D"}, Prompt(CONVERSATION, LONG_PROMPT.raw_text, "C")),
    ],
)
def test_prompts_are_parsed_from_rows_of_any_kind(row: dict[str, Any], expected: Prompt) -> None:
    assert RecordParser().parse(row, Prompt) == expected


@pytest.mark.parametrize(
    ("columns", "row", "record_type", "expected"),
    [
        (
            {"prompt": "q", "rejected": "loser"},
            {"q": "Q", "chosen": "A", "loser": "B"},
            Preference,
            Preference(PROMPT, "A", "B"),
        ),
        ({"document": "body", "target": "tldr"}, {"body": "Q", "tldr": "A"}, Demonstration, Demonstration(PROMPT, "A")),
        ({"messages": "turns"}, {"turns": [USER, ASSISTANT]}, Demonstration, Demonstration(PROMPT, "A")),
        (
            {"chosen": "good", "rejected": "bad"},
            {"good": TRANSCRIPT + " C", "bad": TRANSCRIPT + " D"},
            Preference,
            Preference(LONG_PROMPT, "C", "D"),
        ),
        (
            {"response": "text", "reward": "stars"},
            {"prompt": "Q", "text": "A", "stars": 5},
            Rating,
            Rating(PROMPT, "A", 5.0),
        ),
        (
            {"margin": "gap"},
            {"prompt": "Q", "chosen": "A", "rejected": "B", "gap": 3, "margin": 9},
            Preference,
            Preference(PROMPT, "A", "B", 3.0),
        ),
        # The data have a column 'prompt' with other content. It is not read.
        ({"prompt": "q"}, {"prompt": "system text", "q": "Q"}, Prompt, PROMPT),
    ],
)
def test_columns_are_renamed(columns: dict[str, str], row: dict[str, Any], record_type: type, expected: Any) -> None:
    assert RecordParser(columns).parse(row, record_type) == expected


@pytest.mark.parametrize(
    ("row", "record_type", "reason", "missing"),
    [
        (
            {"prompt": "Q", "chosen": "A", "loser": "B"},
            Preference,
            "the preference record has no field 'rejected' (fields: prompt, chosen, loser)",
            "rejected",
        ),
        (
            {"prompt": "Q", "rejected": "B", "chosen": None},
            Preference,
            "the field 'chosen' of the preference record is null (fields: prompt, rejected)",
            "chosen",
        ),
        ({"chosen": "A", "rejected": "B"}, Preference, "has no field 'prompt'", "prompt"),
        (
            {"prompt": "Q"},
            Demonstration,
            "the demonstration record has no field 'completion' (fields: prompt)",
            "completion",
        ),
        ({"document": "Q"}, Demonstration, "the demonstration record has no field 'target'", "target"),
        (
            {"prompt": "Q", "completion": None},
            Demonstration,
            "the field 'completion' of the demonstration record is null (fields: prompt)",
            "completion",
        ),
        ({"prompt": "Q", "target": None}, Demonstration, "the field 'target' of the demonstration", "target"),
        ({"document": "Q", "completion": None}, Demonstration, "the field 'completion' of the dem", "completion"),
        (
            {"document": "Q", "prompt": None, "completion": None, "target": None},  # as in a file of several forms
            Demonstration,
            "the field 'target' of the demonstration record is null",
            "target",
        ),
        ({"messages": None}, Demonstration, "the field 'messages' of the demonstration record is null", "messages"),
        ({"messages": None}, Prompt, "the field 'messages' of the prompt record is null (fields: none)", "messages"),
        ({"document": None, "target": "A"}, Demonstration, "the field 'document' of the dem", "document"),
        ({"prompt": "Q", "response": None, "label": 1}, UnpairedPreference, "the field 'response' of the", "response"),
        ({"target": "A"}, Demonstration, "the demonstration record has no field 'prompt'", "prompt"),
        ({"prompt": "Q", "response": "A"}, Rating, "the rating record has no field 'reward'", "reward"),
        ({"prompt": "Q", "reward": 1}, Rating, "the rating record has no field 'response'", "response"),
        ({"text": "Q"}, Prompt, "the prompt record has no field 'prompt' (fields: text)", "prompt"),
        ({}, Prompt, "(fields: none)", "prompt"),
        ({"prompt": " \n", "target": "A"}, Demonstration, "the field 'prompt' is empty", None),
        ({"document": "", "target": "A"}, Demonstration, "the field 'document' is empty", None),
        ({"prompt": "Q", "target": "  "}, Demonstration, "the response is empty", None),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, Demonstration, "the response is empty", None),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, Preference, "are identical", None),
        ({"prompt": "Q \ud800", "target": "A"}, Demonstration, "'prompt' contains '\\ud800', which is half of", None),
        ({"prompt": "Q", "target": "é\udfff"}, Demonstration, "'target' contains '\\udfff', which is half of", None),
        ({"messages": [{"role": "user", "content": "\ud801"}]}, Prompt, "'messages' contains '\\ud801'", None),
        ({"chosen": "\n\nHuman: \ud802\n\nAssistant: a", "rejected": "b"}, Preference, "'chosen' contains", None),
        ({"prompt": 7, "target": "A"}, Demonstration, "'prompt' must be text or a list of messages, got 7", None),
        ({"prompt": [], "target": "A"}, Demonstration, "'prompt' must be text or a list of messages, got []", None),
        ({"prompt": "Q", "chosen": {"a": 1}, "rejected": "A"}, Preference, "'chosen' must be text or a list", None),
        ({"prompt": "Q", "target": float("nan")}, Demonstration, "'target' must be text or a list of mess", None),
        ({"prompt": "Q", "target": float("inf")}, Demonstration, "or a list of messages, got inf", None),
        ({"prompt": "Q", "chosen": True, "rejected": False}, Preference, "or a list of messages, got True", None),
        ({"prompt": "Q", "response": False, "reward": 1}, Rating, "or a list of messages, got False", None),
        ({"prompt": "Q", "completion": True, "label": True}, UnpairedPreference, "messages, got True", None),
        ({"messages": "hello"}, Demonstration, "'messages' must be text or a list of messages, got 'hello'", None),
        ({"messages": [{"role": "user"}]}, Demonstration, "must have a 'role' and a 'content' string", None),
        ({"messages": [{"from": "human", "text": "Q"}]}, Demonstration, "every message in the field 'messages'", None),
        ({"messages": ["Q", "A"]}, Demonstration, "must have a 'role' and a 'content' string", None),
        (
            {"messages": [USER]},
            Demonstration,
            "'messages' must end with a message by 'assistant', but the last one is by 'user'",
            None,
        ),
        (
            {"messages": [USER, {**ASSISTANT, "role": "Writer"}]},
            Demonstration,
            "'messages' must end with a message by 'assistant', but the last one is by 'Writer'",
            None,
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [TEXT, {"type": "image_url", "image_url": {}}]}]},
            Demonstration,
            "the 'content' of a message in the field 'messages' must be text, got a list with a part of type "
            "'image_url' (message 2)",
            None,
        ),
        ({"prompt": [{"role": "user", "content": ["Q"]}]}, Prompt, "got a list with a part 'Q' (message 1)", None),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            Prompt,
            "got a list with a part {'type': 'text', 'text': None} (message 1)",
            None,
        ),
        ({"prompt": [{"role": "user", "content": []}]}, Prompt, "must have a 'role' and a 'content' string", None),
        ({"messages": [ASSISTANT]}, Demonstration, "must end with a user message", None),
        ({"prompt": [USER, ASSISTANT], "target": "A"}, Demonstration, "must end with a user message", None),
        ({"chosen": [USER, ASSISTANT], "rejected": ending_with("D")}, Preference, "do not share a prompt", None),
        ({"chosen": TRANSCRIPT + " C", "rejected": "\n\nHuman: X\n\nAssistant: D"}, Preference, "do not share", None),
        ({"prompt": "Q", "response": "A", "reward": "good"}, Rating, "must be a finite number, got 'good'", None),
        ({"prompt": "Q", "response": "A", "reward": 10**400}, Rating, "must be a finite number, got 1000000", None),
        ({"prompt": "Q", "response": "A", "reward": float("nan")}, Rating, "must be a finite number, got nan", None),
        ({"prompt": "Q", "response": "A", "reward": True}, Rating, "must be a finite number, got True", None),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": "big"}, Preference, "'margin' must be a", None),
        ({"prompt": "Q", "completion": "A"}, UnpairedPreference, "preference record has no field 'label'", "label"),
        ({"prompt": "Q", "label": True}, UnpairedPreference, "has no field 'completion'", "completion"),
        (
            {"prompt": "Q", "completion": "A", "label": "yes"},
            UnpairedPreference,
            "'label' must be true or false, got 'yes'",
            None,
        ),
        (
            {"prompt": "Q", "completion": "A", "label": -1},
            UnpairedPreference,
            "'label' must be true or false, got -1",
            None,
        ),
    ],
)
def test_an_invalid_row_is_explained(row: dict[str, Any], record_type: type, reason: str, missing: str | None) -> None:
    """The reason uses the name of the column in the data; ``missing`` is the key of ``data.columns``."""
    with pytest.raises(RecordError) as caught:
        RecordParser().parse(row, record_type)
    assert reason in str(caught.value)
    assert caught.value.missing == missing


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
CALLS_TOOLS = "a message in the field 'messages' has tool calls, which are not supported"
DESCRIBES_TOOLS = "the field 'tools' describes tools, which are not supported"


@pytest.mark.parametrize(
    ("message", "row", "reason"),
    [
        ({"tool_calls": [CALL]}, {}, CALLS_TOOLS),
        ({"tool_calls": [CALL], "content": None}, {}, CALLS_TOOLS),
        ({"function_call": {"name": "add", "arguments": ""}, "content": None}, {}, CALLS_TOOLS),
        ({"tool_calls": '[{"name": "add"}]'}, {}, CALLS_TOOLS),
        ({}, {"tools": [CALL]}, DESCRIBES_TOOLS),
        ({}, {"tools": '[{"name": "add"}]'}, DESCRIBES_TOOLS),
        ({"tool_calls": [], "function_call": None}, {"tools": []}, None),
        ({"tool_calls": [{"id": None, "function": {"name": None}}]}, {"tools": None}, None),
        ({"function_call": "null"}, {"tools": "[]"}, None),
        ({}, {"tools": "hammer and saw"}, None),
    ],
)
def test_tools_and_calls_are_not_dropped(message: dict[str, Any], row: dict[str, Any], reason: str | None) -> None:
    """Without its call, the first response would be empty, and the message of the tool would follow it."""
    first = {"role": "assistant", "content": "", **message}
    messages = [USER, first, {"role": "tool", "name": "add", "content": "5"}, ASSISTANT]
    for record_type in (Demonstration, Prompt):
        if reason is None:
            assert RecordParser().parse({"messages": messages, **row}, record_type)
        else:
            with pytest.raises(RecordError, match=f"^{reason}$") as caught:
                RecordParser().parse({"messages": messages, **row}, record_type)
            assert caught.value.missing is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"thinking": "2 and 2"}, "has reasoning in 'thinking', which is not supported"),
        ({"reasoning_content": "2 and 2", "thinking": ""}, "has reasoning in 'reasoning_content', which is not"),
        ({"reasoning": [{"text": "2 and 2"}]}, "has reasoning in 'reasoning', which is not supported"),
        ({"weight": 0}, "has the weight 0, but weights are not supported"),
        ({"weight": 0.5}, "has the weight 0.5, but weights are not supported"),
        ({"thinking": None, "reasoning_content": " ", "reasoning": [None], "weight": 1}, None),
        ({"weight": None, "name": "a"}, None),
    ],
)
def test_reasoning_and_weights_of_learned_messages_are_not_dropped(fields: dict[str, Any], reason: str | None) -> None:
    """Without them, the model would learn to respond at once, or responses that should not be learned.

    Only the last message by the assistant is learned, unless ``all_learned``. Earlier ones are read, as in data for
    OpenAI, in which they have the weight 0.
    """
    for position, all_learned in ((1, False), (1, True), (3, False), (3, True)):
        messages = [{**USER, "weight": 0}, ASSISTANT, USER, ASSISTANT]
        messages[position] = {**ASSISTANT, **fields}
        parser = RecordParser(all_learned=all_learned)
        if reason is None or (position == 1 and not all_learned):
            assert parser.parse({"messages": messages}, Demonstration).response == "A"
        else:
            with pytest.raises(RecordError, match=f"^a message in the field 'messages' {reason}") as error:
                parser.parse({"messages": messages}, Demonstration)
            assert error.value.fix is not None


def test_a_column_of_tools_can_be_a_field() -> None:
    assert RecordParser({"prompt": "tools"}).parse({"tools": "[1]", "target": "A"}, Demonstration).response == "A"


def test_a_field_mapped_to_none_keeps_its_name() -> None:
    """The configuration maps every field to null by default; one of them is renamed here."""
    parser = RecordParser({**dict.fromkeys(FIELDS), "rejected": "loser"})
    row = {"prompt": "Q", "chosen": "A", "loser": "B", "rejected": "C"}
    assert parser.parse(row, Preference) == Preference(PROMPT, "A", "B")


@pytest.mark.parametrize(
    ("columns", "fix"),
    [
        ({"reject": "loser"}, r"Set data\.columns\.<field>=reject"),
        ({"loser": "rejected"}, r"Set data\.columns\.rejected=loser"),
        ({"reject": None}, r"Set data\.columns\.<field>=reject"),
    ],
    ids=["unknown", "key and value swapped", "unknown and null"],
)
def test_an_unknown_field_name_is_rejected(columns: dict[str, str | None], fix: str) -> None:
    """The message names the key, its value, the known fields, and the fix."""
    ((name, column),) = columns.items()
    message = (
        rf"^data\.columns\.{name}={column}: '{name}' is not a field .* prompt, document, .*, history; .*\n  {fix}$"
    )
    with pytest.raises(ConfigError, match=message):
        RecordParser({"prompt": "Q", **columns})


@pytest.mark.parametrize(
    ("columns", "name", "other"),
    [
        ({"prompt": "reply", "target": "reply"}, "target", "prompt"),
        ({"chosen": "text", "rejected": "text", "prompt": None}, "rejected", "chosen"),
        ({"target": "prompt"}, "target", "prompt"),
        ({"target": "prompt", "prompt": "prompt"}, "prompt", "target"),
        ({"prompt": "text", "system": "text"}, "system", "prompt"),
    ],
)
def test_fields_of_different_content_need_different_columns(
    columns: dict[str, str | None], name: str, other: str
) -> None:
    """A prompt that is also its response would be learned."""
    with pytest.raises(ConfigError) as error:
        RecordParser(columns)
    assert str(error.value) == (
        f"data.columns.{name}={columns[name]}: the field '{other}' has the same column.\n"
        f"  Set data.columns.{name}=<column> or data.columns.{other}=<column>"
    )


@pytest.mark.parametrize(
    ("columns", "row", "record_type", "expected"),
    [
        ({"target": "good", "chosen": "good"}, {"prompt": "Q", "good": "A"}, Demonstration, Demonstration(PROMPT, "A")),
        ({"messages": "prompt"}, {"prompt": [USER, ASSISTANT]}, Demonstration, Demonstration(PROMPT, "A")),
        ({"prompt": "q", "target": "prompt"}, {"q": "Q", "prompt": "A"}, Demonstration, Demonstration(PROMPT, "A")),
    ],
    ids=["for several stages", "a conversation", "swapped"],
)
def test_fields_of_the_same_content_may_have_one_column(
    columns: dict[str, str | None], row: dict[str, Any], record_type: type, expected: Any
) -> None:
    assert RecordParser(columns).parse(row, record_type) == expected


def test_a_missing_renamed_field_is_reported_under_its_name_in_the_data() -> None:
    with pytest.raises(RecordError, match=r"no field 'loser' \(fields: prompt, chosen\)") as caught:
        RecordParser({"rejected": "loser"}).parse({"prompt": "Q", "chosen": "A"}, Preference)
    assert caught.value.missing == "rejected"


def test_a_renamed_response_of_a_demonstration_is_the_missing_one() -> None:
    with pytest.raises(RecordError, match=r"no field 'summary' \(fields: prompt\)") as caught:
        RecordParser({"target": "summary"}).parse({"prompt": "Q"}, Demonstration)
    assert caught.value.missing == "target"


@pytest.mark.parametrize(
    ("columns", "row", "record_type", "name"),
    [
        ({"prompt": "q"}, {"q": "", "target": "A"}, Demonstration, "q"),
        ({"reward": "stars"}, {"prompt": "Q", "response": "A", "stars": "five"}, Rating, "stars"),
        ({"messages": "turns"}, {"turns": 3}, Demonstration, "turns"),
        ({"label": "good"}, {"prompt": "Q", "completion": "A", "good": 0.5}, UnpairedPreference, "good"),
    ],
)
def test_an_invalid_renamed_field_is_reported_under_its_name_in_the_data(
    columns: dict[str, str], row: dict[str, Any], record_type: type, name: str
) -> None:
    with pytest.raises(RecordError, match=f"field '{name}'"):
        RecordParser(columns).parse(row, record_type)
