"""Reading records: the detected kind, the report of invalid rows, and the held-out records."""

import json
import logging
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hydra.utils import instantiate

from contract.configs import compose_config
from rlhf.data import Demonstration, Preference, Prompt, Rating, UnpairedPreference
from rlhf.data.parser import RecordParser
from rlhf.data.reading import RecordReader, hold_out
from rlhf.data.records import CONTEXT, FIELDS, Record
from rlhf.errors import DataError

Write = Callable[..., str]
Demonstrations = Callable[[int], list[dict[str, str]]]
READER = RecordReader(RecordParser())
LOSER_COLUMN = {"prompt": "Q", "chosen": "A", "loser": "B"}
QUESTION = Prompt([{"role": "user", "content": "Q"}], "Q")


def test_records_are_in_file_order(write: Write, demonstrations: Demonstrations) -> None:
    assert list(READER.read(write(*demonstrations(3)), "train", (Demonstration,))) == [
        Demonstration(Prompt([{"role": "user", "content": f"Q{i}"}], f"Q{i}"), f"A{i}") for i in range(3)
    ]


def test_a_missing_field_is_reported_with_line_and_fix(tmp_path: Path) -> None:
    """The invalid row is in line 3, because the blank line 2 counts."""
    path = tmp_path / "prefs.jsonl"
    valid = json.dumps({"prompt": "Q", "chosen": "A", "rejected": "B"})
    path.write_text(f"{valid}\n\n{json.dumps(LOSER_COLUMN)}\n")
    with pytest.raises(DataError) as caught:
        READER.read(str(path), "train", (Preference,))
    assert str(caught.value) == (
        f"{path}:3: the preference record has no field 'rejected' (fields: prompt, chosen, loser).\n"
        "  If the field has another name: data.columns.rejected=loser\n"
        '  Expected: {"prompt": "...", "chosen": "...", "rejected": "..."}\n'
        "  To skip invalid rows: data.on_error=skip"
    )


def test_a_null_field_is_not_looked_for_under_another_name(write: Write) -> None:
    path = write({"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": None})
    with pytest.raises(DataError) as caught:
        READER.read(path, "train", (Demonstration,))
    assert str(caught.value).startswith(f"{path}:2: the field 'completion' of the demonstration record is null (fields")
    assert "data.columns" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "is_clear"),
    [
        (["bad", "good"], True),
        (["Thumbs down", "Thumbs up"], True),
        (["toxic", "non-toxic"], True),
        (["formal", "informal"], False),
        (["bad", "good", "unknown"], False),
    ],
)
def test_classes_of_labels_that_are_not_known_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str], is_clear: bool
) -> None:
    """The first class has the number 0, which is an undesirable response."""
    path = write_labels(tmp_path, names)
    reader = RecordReader(RecordParser({"label": "liked"}))
    assert list(reader.read(path, "train", (Demonstration,))) == [Demonstration(QUESTION, "A")]
    assert list(reader.read(path, "train", (UnpairedPreference,))) == [UnpairedPreference(QUESTION, "A", True)]
    classes = " and ".join(f"{number} = '{name}'" for number, name in enumerate(names))
    message = f"{path}: the field 'liked' has the classes {classes}. 0 is read as undesirable, 1 as desirable."
    assert [record.message for record in caplog.records] == ([] if is_clear else [message])


@pytest.mark.parametrize("names", [["good", "bad"], ["Safe", "toxic"]])
def test_classes_of_labels_in_reverse_order_are_refused(tmp_path: Path, names: list[str]) -> None:
    path = write_labels(tmp_path, names)
    with pytest.raises(DataError) as error:
        RecordReader(RecordParser({"label": "liked"})).read(path, "train", (UnpairedPreference,))
    assert str(error.value).splitlines() == [
        f"{path}: the field 'liked' has the classes 0 = '{names[0]}' and 1 = '{names[1]}', but 0 must mean undesirable "
        "and 1 desirable.",
        "  Store a copy of the data in which 'liked' is true or false.",
    ]


def write_labels(folder: Path, names: list[str]) -> str:
    """Write a row with the label 1 of a ``ClassLabel``."""
    features = Features({"prompt": Value("string"), "completion": Value("string"), "liked": ClassLabel(names=names)})
    rows = Dataset.from_dict({"prompt": ["Q"], "completion": ["A"], "liked": [1]}, features=features)
    rows.to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


@pytest.mark.parametrize(
    ("columns", "rows", "reported"),
    [
        ({}, [{"prompt": "Q"}, {"prompt": "Q", "system": "Be brief."}], "the field 'system' is the system"),
        ({"system": "persona"}, [{"prompt": "Q", "persona": "Be brief."}], "the field 'persona' is the system"),
        ({"system": ""}, [{"prompt": "Q", "system": "gpt-4"}], None),
        ({}, [{"messages": [{"role": "system", "content": "S"}, *QUESTION.messages], "system": "gpt-4"}], None),
    ],
)
def test_the_column_of_the_system_prompt_is_reported(
    write: Write,
    caplog: pytest.LogCaptureFixture,
    columns: dict[str, str | None],
    rows: list[dict[str, Any]],
    reported: str | None,
) -> None:
    """In other data, a column of this name contains which system wrote the response."""
    with caplog.at_level(logging.INFO, logger="rlhf"):
        RecordReader(RecordParser(columns)).read(path := write(*rows), "train", (Prompt,))
    ending = "prompt of its row, such as 'Be brief.'. To ignore it: data.columns.system="
    expected = [] if reported is None else [f"{path}: {reported} {ending}"]
    assert [record.message for record in caplog.records][:-1] == expected


def test_a_field_can_be_ignored_on_the_command_line(write: Write) -> None:
    """The overrides that the log and an error suggest."""
    overrides = ["stage=sft", "data=jsonl", "data.val_fraction=0", "data.columns.system=", "data.columns.history="]
    path = write({"prompt": "Q", "completion": "A", "system": "gpt-4", "history": ["T"]})
    data = instantiate(compose_config(*overrides).data, train=path)
    assert list(data.records("train")) == [Demonstration(QUESTION, "A")]


def test_the_kind_of_invalid_rows_is_that_of_their_fields(write: Write) -> None:
    """The reward is text. The message must not ask for the fields of a preference pair."""
    path = write({"prompt": "Q", "response": "A", "reward": "0.5"})
    with pytest.raises(DataError, match=r"the field 'reward' must be a finite number, got '0\.5'"):
        READER.read(path, "train", (Preference, Rating))


def test_conversations_of_sharegpt_are_suggested_as_messages(write: Write) -> None:
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    with pytest.raises(DataError, match=r"data\.columns\.messages=conversations"):
        READER.read(write(row), "train", (Demonstration,))
    reader = RecordReader(RecordParser({"messages": "conversations"}))
    assert list(reader.read(write(row), "train", (Demonstration,))) == [Demonstration(QUESTION, "A")]


@pytest.mark.parametrize("empty", ["chosen", "rejected"])
def test_empty_responses_of_pairs_are_counted(write: Write, caplog: pytest.LogCaptureFixture, empty: str) -> None:
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    path = write(pair, {**pair, empty: " "})
    READER.read(path, "train", (Preference,))
    assert f"1 of 2 records have an empty chosen or rejected response; the first one: {path}:2" in caplog.text


def test_the_suggested_column_is_not_empty(write: Write) -> None:
    """Another row has a margin and this one does not, so 'margin' cannot be the column of 'rejected'."""
    path = write(LOSER_COLUMN, {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 1.0})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*loser\)\.\n.*data\.columns\.rejected=loser\n"):
        READER.read(path, "train", (Preference,))


def test_the_suggested_column_fixes_the_error(write: Write) -> None:
    reader = RecordReader(RecordParser({"rejected": "loser"}))
    assert list(reader.read(write(LOSER_COLUMN), "train", (Preference,))) == [Preference(QUESTION, "A", "B")]


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        (" prompt , completion ", {"prompt": " prompt ", "completion": " completion "}),
        ("Prompt,Completion,topic", {"prompt": "Prompt", "completion": "Completion"}),
        ("prompt,model's text", {"completion": "model's text"}),
        ("prompt,{a: $b}", {"completion": "{a: $b}"}),
    ],
)
def test_suggested_columns_can_be_typed(tmp_path: Path, header: str, columns: dict[str, str]) -> None:
    """Hydra and the shell both need quotes."""
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\nQ,A{',x' * (header.count(',') - 1)}\n")
    overrides = ["stage=sft", "data=jsonl", "data.val=null", "data.val_fraction=0"]
    with pytest.raises(DataError) as caught:
        instantiate(compose_config(*overrides).data, train=str(path)).records("train")
    suggested = re.search(r"other names?: (.*)", str(caught.value).replace("another name", "other name"))
    assert suggested is not None
    overrides += shlex.split(suggested[1])
    data = compose_config(*overrides).data
    assert {name: column for name, column in data.columns.items() if column is not None} == columns
    assert list(instantiate(data, train=str(path)).records("train")) == [Demonstration(QUESTION, "A")]


@pytest.mark.parametrize(
    ("columns", "row", "record_type", "hint"),
    [
        (
            {},
            {"question": "Q", "reply": "A"},
            Demonstration,
            "fields have other names: data.columns.prompt=question data.columns.completion=reply",
        ),
        (
            {"target": "reply"},
            {"question": "Q", "reply": "A"},
            Demonstration,
            "field has another name: data.columns.prompt=question",
        ),
        (
            {},
            {"reply": "A", "id": 3, "Question": "Q", "source": "web"},
            Demonstration,
            "fields have other names: data.columns.prompt=Question data.columns.completion=reply",
        ),
        (
            {},
            {"first": "Q", "second": "A"},
            Demonstration,
            "fields have other names: data.columns.prompt=<name> data.columns.completion=<name>",
        ),
        (
            {},
            {"chosen": "A", "loser": "B", "question": "Q"},
            Preference,
            "fields have other names: data.columns.prompt=question data.columns.rejected=loser",
        ),
        (
            {},
            {"chosen": "\n\nHuman: Q\n\nAssistant: A", "other": "\n\nHuman: Q\n\nAssistant: B"},
            Preference,
            "field has another name: data.columns.rejected=other",
        ),
        (
            {},
            {"query": "Q", "completion": "A"},
            UnpairedPreference,
            "fields have other names: data.columns.prompt=query data.columns.label=<name>",
        ),
        ({}, {"prompt": "Q", "response": "A", "stars": 4}, Rating, "field has another name: data.columns.reward=stars"),
    ],
)
def test_a_column_is_suggested_for_each_missing_field(
    write: Write, columns: dict[str, str | None], row: dict[str, Any], record_type: type[Record], hint: str
) -> None:
    """A column in use is not suggested for another field, and neither is one of several that may be meant."""
    with pytest.raises(DataError) as caught:
        RecordReader(RecordParser(columns)).read(write(row), "train", (record_type,))
    assert str(caught.value).splitlines()[1] == f"  If the {hint}"


def test_usual_names_are_recognized_by_their_columns(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        READER.read(write({"question": "Q", "answer": "A"}), "train", (Demonstration,))
    assert "data.columns.prompt=question data.columns.completion=answer\n" in str(caught.value)


DEMONSTRATION = {"prompt": "Q", "completion": "A"}
PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}
PLAIN_TEXT = "Plain text is not supported: each row must have a prompt and a response."
PLAIN_TEXT_OF_SFT = (
    "Plain text is not supported. For stage=sft, write the first word of each text to 'prompt' and the rest to "
    "'completion', and add 'data.template=\"{prompt}\"' data.loss_on=all"
)


@pytest.mark.parametrize(
    ("row", "record_types", "found"),
    [
        (
            {"prompt": "Q", "completion": "A", "label": True},
            (Preference,),
            ["The row has the form of unpaired preferences, which are read by stage=dpo loss=kto."],
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            (Preference, Rating),
            ["The row has the form of demonstrations, which are read by stage=sft."],
        ),
        (
            {"instruction": "Q", "output": "A"},
            (Preference,),
            ["The row has the form of demonstrations, which are read by stage=sft."],
        ),
        (
            {**PAIR, "completion": None},
            (Demonstration,),
            ["The row has the form of preferences, which are read by stage=reward, stage=dpo."],
        ),
        (
            {"prompt": "Q"},
            (Demonstration,),
            [
                "The row has the form of prompts, which are read by stage=ppo, stage=grpo, stage=collect, "
                "stage=evaluate."
            ],
        ),
        ({"text": "Q"}, (Demonstration,), [PLAIN_TEXT_OF_SFT]),
        ({"text": "Q"}, (Preference, Rating), [PLAIN_TEXT]),
        (
            {"text": "Q", "url": "U"},
            (Demonstration,),
            [
                PLAIN_TEXT_OF_SFT,
                "If the fields have other names: data.columns.prompt=<name> data.columns.completion=<name>",
            ],
        ),
        ({"text": "Q"}, (Prompt,), ["If the field has another name: data.columns.prompt=text"]),
        (
            {"prompt": "Q", "response": "A", "score": 1},
            (Preference, Rating),
            ["If the field has another name: data.columns.reward=score"],
        ),
    ],
)
def test_rows_for_another_stage_are_recognized(
    write: Write, row: dict[str, Any], record_types: tuple[type[Record], ...], found: list[str]
) -> None:
    """No column is suggested for them."""
    with pytest.raises(DataError) as caught:
        READER.read(write(row), "train", record_types)
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip() for line in lines[:-2]] == found
    assert lines[-2].startswith("  Expected: ")


def test_one_row_of_another_form_needs_another_file(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        READER.read(write(PAIR, DEMONSTRATION), "train", (Preference,))
    assert "form of demonstrations, which are read by stage=sft. Use one file per form.\n" in str(caught.value)


@pytest.mark.parametrize("data", ["demo", "jsonl", "hub"])
def test_the_configuration_declares_every_field(data: str) -> None:
    """``data.columns.<field>`` can be set for each field of a record, and is null by default."""
    cfg = compose_config("stage=dpo", f"data={data}")
    assert dict(cfg.data.columns) == dict.fromkeys([*FIELDS, *CONTEXT])


@pytest.mark.parametrize("stage", ["reward", "dpo"])
@pytest.mark.parametrize("data", ["demo", "jsonl"])
def test_the_suggested_override_works_on_the_command_line(write: Write, stage: str, data: str) -> None:
    """Compose the configuration, read the override from the error message, and compose again with it."""
    path = write(LOSER_COLUMN)
    overrides = (f"stage={stage}", f"data={data}", "data.val=null", "data.val_fraction=0")
    with pytest.raises(DataError) as caught:
        instantiate(compose_config(*overrides).data, train=path).records("train")
    suggested = re.search(r"data\.columns\.\S+", str(caught.value))
    assert suggested is not None
    assert suggested.group() == "data.columns.rejected=loser"
    datamodule = instantiate(compose_config(*overrides, suggested.group()).data, train=path)
    assert list(datamodule.records("train")) == [Preference(QUESTION, "A", "B")]


def test_a_directory_is_not_taken_for_a_hub_dataset(tmp_path: Path) -> None:
    """The message names files that could be meant. With ``data=hub``, a local copy of a dataset can be read."""
    files = [tmp_path / name for name in ("a.jsonl", "b.csv", "README.md")]
    for file in files:
        file.write_text(json.dumps(DEMONSTRATION) + "\n")
    with pytest.raises(DataError) as caught:
        instantiate(compose_config("stage=sft", "data=jsonl").data, train=str(tmp_path)).records("train")
    assert str(caught.value) == (
        f"{tmp_path} is a directory.\n  Name one of its files: data.train={files[0]} or data.train={files[1]}"
    )
    files[1].unlink()
    hub = instantiate(compose_config("stage=sft", "data=hub", "data.val_fraction=0").data, train=str(tmp_path))
    assert list(hub.records("train")) == [Demonstration(QUESTION, "A")]


def test_five_invalid_rows_are_shown_and_all_are_counted(write: Write, demonstrations: Demonstrations) -> None:
    """7 of 9 rows are invalid: 5 lines, and a line with the number of the others."""
    path = write(*demonstrations(2), *({"document": f"Q{i}", "target": ""} for i in range(7)))
    with pytest.raises(DataError) as caught:
        READER.read(path, "train", (Demonstration,))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:5]] == [f"{path}:{number}" for number in range(3, 8)]
    assert lines[5] == "... and 2 more of 9 rows."


def test_csv_rows_are_located_by_row_number(tmp_path: Path) -> None:
    """A CSV field may contain line breaks, so line numbers do not help. The header is not a row."""
    path = tmp_path / "rows.csv"
    path.write_text('document,target\n"two\nlines",A\nQ,\n')
    with pytest.raises(DataError, match=r"rows\.csv, row 2: the field 'target' of the demonstration record is null"):
        READER.read(str(path), "train", (Demonstration,))


def test_skipped_rows_are_counted_in_the_log(
    write: Write, demonstrations: Demonstrations, caplog: pytest.LogCaptureFixture
) -> None:
    """2 of 5 rows are invalid. The log shows the first one."""
    rows = demonstrations(3)
    path = write(rows[0], {"document": "Q"}, rows[1], {"document": "", "target": "A"}, rows[2])
    reader = RecordReader(RecordParser(), on_error="skip")
    with caplog.at_level(logging.INFO, logger="rlhf"):
        records = reader.read(path, "train", (Demonstration,))
    assert [record.response for record in records] == ["A0", "A1", "A2"]
    assert f"{path}: skipped 2 invalid rows; the first one: {path}:2: the demonstration record has no" in caplog.text
    assert "read 3 records, skipped 2 invalid rows" in caplog.text


def test_a_file_without_a_valid_row_is_an_error_even_when_skipping(write: Write) -> None:
    with pytest.raises(DataError, match="contain no valid record"):
        RecordReader(RecordParser(), on_error="skip").read(write({"document": "Q"}), "train", (Demonstration,))


def test_the_first_row_determines_the_record_type(write: Write) -> None:
    rating = {"prompt": "Q", "response": "A", "reward": 0.5}
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    for row, record_type in ((rating, Rating), (pair, Preference)):
        (record,) = READER.read(write(row), "train", (Preference, Rating))
        assert type(record) is record_type


def test_max_rows_limits_what_is_read(write: Write, demonstrations: Demonstrations) -> None:
    """The invalid fourth row is not parsed."""
    path = write(*demonstrations(3), {"document": "Q"})
    assert len(RecordReader(RecordParser(), max_rows=2).read(path, "train", (Demonstration,))) == 2


def test_hold_out_by_hand() -> None:
    """15 % of 10 records are 1.5, rounded to 2. Both parts keep the order, and the seed decides."""
    records = list(range(10))
    train, val = hold_out(records, 0.15, seed=0)
    assert (len(train), len(val)) == (8, 2)
    assert (train, val) == (sorted(train), sorted(val))
    assert sorted(train + val) == records
    assert hold_out(records, 0.15, seed=0) == (train, val)
    assert hold_out(records, 0.15, seed=1) != (train, val)


def test_hold_out_keeps_one_record_for_training() -> None:
    assert hold_out(["only"], 0.9, seed=0) == (["only"], [])
    assert len(hold_out(["one", "two"], 0.9, seed=0)[0]) == 1
