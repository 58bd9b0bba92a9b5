"""Rows of files of every format, and the location of an invalid one."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rlhf.data.files import location, read_rows
from rlhf.data.json_files import JsonLines
from rlhf.data.parser import RecordParser
from rlhf.data.reading import EVERY_COLUMN, RecordReader
from rlhf.data.records import Demonstration, Prompt, RecordError
from rlhf.errors import DataError

ROWS = [{"prompt": 'a, "b"\nc', "reward": 0.5}, {"prompt": "Ωmega 東", "reward": -2.0}, {"prompt": "x", "reward": 3.0}]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        sep = "\t" if path.suffix == ".tsv" else ","
        Dataset.from_list(rows).to_csv(path, index=False, sep=sep)
    return str(path)


@pytest.mark.parametrize("extension", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "JSONL"])
def test_every_format_gives_the_same_rows(tmp_path: Path, extension: str) -> None:
    """Rows may contain commas, quotes, line breaks and characters beyond ASCII."""
    path = write(tmp_path / f"rows.{extension.lower()}", ROWS)
    path = str(Path(path).rename(tmp_path / f"rows.{extension}"))
    rows = read_rows(path)
    assert [rows[i] for i in range(len(rows))] == ROWS


def test_nested_messages_are_read(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}]
    assert list(read_rows(write(tmp_path / "talk.jsonl", rows))) == rows


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """The cache of the datasets library must not return outdated rows."""
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert len(read_rows(path)) == 3
    write(tmp_path / "rows.jsonl", ROWS[:1])
    assert len(read_rows(path)) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "x"', "the line is not JSON"),
        ("[1, 2]", "the line must be a JSON object, got list"),
        ('{"prompt": "x", "prompt": "y"}', "the field 'prompt' is specified twice"),
        ('{"prompt": {"a": 1, "a": 1}}', "the field 'a' is specified twice"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", r"the line is not JSON that can be read \(RecursionError\)"),
        ('{"x": ' + "1" * 5000 + "}", r"the line is not JSON that can be read \(ValueError\)"),
    ],
)
def test_an_invalid_line_does_not_hide_the_others(tmp_path: Path, line: str, reason: str) -> None:
    """The invalid line is row 1 and line 3, because the blank line 2 counts."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n\n{line}\n{{"prompt": "b"}}\n')
    rows = read_rows(str(path))
    with pytest.raises(RecordError, match=reason):
        rows[1]
    assert [rows[0], rows[2]] == [{"prompt": "a"}, {"prompt": "b"}]
    assert location(str(path), 1) == f"{path}:3"
    assert isinstance(rows, JsonLines)
    assert [rows.line_number(index) for index in range(3)] == [1, 3, 4]


def test_rows_may_have_different_fields_and_types(tmp_path: Path) -> None:
    """pyarrow would reject the second row, and lose an entry of the third (apache/arrow#51305)."""
    rows: list[dict[str, Any]] = [{"a": "x", "b": 1}, {"a": 5}, {"a": [None, 1]}, {"c": {"d": None}}]
    assert list(read_rows(write(tmp_path / "rows.jsonl", rows))) == rows
    assert list(read_rows(write(tmp_path / "rows.json", rows))) == rows


def test_json_lines_in_a_json_file_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(read_rows(str(path))) == ROWS


def test_a_line_that_is_not_utf8_is_invalid(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + '{"prompt": "straße"}\n'.encode("latin-1"))
    with pytest.raises(RecordError, match=r"the line is not UTF-8 \(.* at byte 16\)") as error:
        read_rows(str(path))[1]
    assert f"iconv -f latin1 -t utf-8 {path}" in str(error.value.fix)
    assert location(str(path), 1) == f"{path}:2"


@pytest.mark.parametrize("name", ["rows.json", "rows.csv"])
def test_a_file_that_is_not_utf8_is_rejected(tmp_path: Path, name: str) -> None:
    """The datasets library alone would fail only when the row is accessed."""
    path = tmp_path / name
    path.write_bytes('{"prompt": "straße"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=rf"{name}: the file must be UTF-8.*\n  Convert it, .*iconv"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_file_in_utf16_can_be_converted(tmp_path: Path, name: str) -> None:
    """PowerShell writes such files. They begin with a byte order mark, which is not valid UTF-8."""
    path = tmp_path / name
    path.write_bytes('{"prompt": "straße"}\n'.encode("utf-16"))
    with pytest.raises(DataError) as error:
        list(read_rows(str(path)))
    fix = error.value.fix if isinstance(error.value, RecordError) else str(error.value)
    assert f"Convert it from UTF-16: iconv -f utf-16 -t utf-8 {path} > <new file>" in str(fix)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", None, r"rows\.jsonl: there is no such file\.\n  Relative paths"),
        ("rows.jsonl", "", r"rows\.jsonl: the file is empty"),
        ("rows.txt", "hello", r"rows\.txt: the file extension '\.txt' is not supported\.\n.*\.jsonl"),
        ("rows.parquet", "hello", r"rows\.parquet: the file cannot be read"),
        ("rows.csv", '{"prompt": "a"}\n', r"rows\.csv: the content is JSON, .*\n  Rename the file: .*rows\.jsonl"),
        ("rows.json", '{"a": [{"x": 1}], "b": [{"x": 1}]}', r"rows\.json: the file contains several lists .*\(a, b\)"),
        ("rows.json", '[{"x": 1},\n {"x"}]', r"rows\.json:2: the file is not JSON \(Expecting ':' .* at column 6\)"),
        ("rows.json", '[{"x": 1}, 2]', r"rows\.json, row 2: the row must be a JSON object, got int"),
        ("rows.json", '[{"x": 1, "x": 1}]', r"rows\.json: the field 'x' is specified twice"),
        ("rows.json", "[" * 100_000, r"rows\.json: the file is not JSON that can be read \(RecursionError\)"),
    ],
)
def test_an_unreadable_file_is_explained(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "rows.tsv", "rows.jsonl"])
def test_a_file_without_rows_is_empty(tmp_path: Path, name: str) -> None:
    """A Parquet file without rows has columns, a CSV file without rows has a header."""
    path = tmp_path / name
    if path.suffix == ".parquet":
        Dataset.from_dict({"prompt": [], "completion": []}).to_parquet(path)
    else:
        path.write_text({".csv": "prompt,completion\n", ".tsv": "prompt\tcompletion\n"}.get(path.suffix, ""))
    with pytest.raises(DataError) as error:
        read_rows(str(path))
    assert str(error.value) == f"{path}: the file is empty."


def test_rows_under_one_key_of_a_json_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert list(read_rows(str(path))) == ROWS


def test_one_record_in_a_json_file_is_a_row(tmp_path: Path) -> None:
    """Its list of messages is not a list of rows."""
    record = {"messages": [{"role": "user", "content": "Q"}]}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(record))
    assert list(read_rows(str(path))) == [record]


def test_a_csv_file_may_have_semicolons(tmp_path: Path) -> None:
    """Spreadsheets write them in countries where the comma is the decimal mark."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt;reward\na, b;0.5\n")
    assert list(read_rows(str(path))) == [{"prompt": "a, b", "reward": 0.5}]


@pytest.mark.parametrize("extension", ["csv", "tsv"])
def test_cells_of_text_are_read_as_they_are(tmp_path: Path, extension: str) -> None:
    """Only empty cells are missing. pandas would take ``None`` and ``NA`` for missing, 007 for 7, and 5 for 5.0."""
    path = tmp_path / f"rows.{extension}"
    lines = ["prompt,chosen,rejected,topic", "None,NA,007,null", "nan,5,1.50,x", '"",,2,']
    path.write_text("\n".join(lines).replace(",", "," if extension == "csv" else "\t") + "\n")
    assert list(read_rows(str(path))) == [
        {"prompt": "None", "chosen": "NA", "rejected": "007", "topic": "null"},
        {"prompt": "nan", "chosen": "5", "rejected": "1.50", "topic": "x"},
        {"prompt": None, "chosen": None, "rejected": "2", "topic": None},
    ]


def test_cells_of_numbers_are_numbers_or_missing(tmp_path: Path) -> None:
    """R writes ``NA`` for a missing number. What is not a number remains text, so that its row is the invalid one."""
    path = tmp_path / "rows.csv"
    path.write_text("reward,margin,label,stars\n1,NA,true,4\n0.5,2,FALSE,\n1e-1,five,1,04\n1_0,,yes,x\n")
    assert list(read_rows(str(path))) == [
        {"reward": 1.0, "margin": None, "label": True, "stars": "4"},
        {"reward": 0.5, "margin": 2.0, "label": False, "stars": None},
        {"reward": 0.1, "margin": "five", "label": 1, "stars": "04"},
        {"reward": "1_0", "margin": None, "label": "yes", "stars": "x"},
    ]


def test_columns_with_other_names_determine_the_cells_of_numbers(tmp_path: Path) -> None:
    """The column ``margin`` is the response here. pandas alone would read 7.0 and 12.0, because a cell is empty."""
    path = tmp_path / "rows.csv"
    path.write_text("question,margin,stars,label\n1,007,4,1\n2,,0.5,0\n3,12,,NA\n")
    columns = {"prompt": "question", "completion": "margin", "reward": "stars"}
    rows = read_rows(str(path), columns=columns)
    assert list(rows) == [
        {"question": "1", "margin": "007", "stars": 4.0, "label": True},
        {"question": "2", "margin": None, "stars": 0.5, "label": False},
        {"question": "3", "margin": "12", "stars": None, "label": None},
    ]
    assert RecordParser(columns).parse(rows[0], Demonstration).response == "007"
    records = RecordReader(RecordParser(columns)).read(str(path), "train", [Prompt])
    assert records.existing_columns(["stars", "score"]) == {"stars"}
    assert records.existing_columns([EVERY_COLUMN]) == {"question", "margin", "stars", "label"}


def test_every_column_includes_those_of_later_rows(tmp_path: Path) -> None:
    """The invalid row is skipped."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt"\n{"prompt": "b", "level": 1}\n')
    records = RecordReader(RecordParser(), on_error="skip").read(str(path), "train", [Prompt])
    assert records.existing_columns([EVERY_COLUMN, "other"]) == {"prompt", "level"}


def test_the_first_rows_do_not_determine_the_types_of_the_others(tmp_path: Path) -> None:
    """``datasets`` reads 10,000 rows at once. In these, the ratings are integers, and the input is empty."""
    path = tmp_path / "rows.csv"
    lines = [f"{i},1,,," for i in range(10_000)] + [f"{'9' * 30},0.5,x,y,z", "a,0,x,y,z"]
    path.write_text("\n".join(["id,reward,input,note,label", *lines]) + "\n")
    rows = read_rows(str(path))
    assert [rows[9_999], *list(rows)[10_000:]] == [
        {"id": "9999", "reward": 1.0, "input": None, "note": None, "label": None},
        {"id": "9" * 30, "reward": 0.5, "input": "x", "note": "y", "label": "z"},
        {"id": "a", "reward": 0.0, "input": "x", "note": "y", "label": "z"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "line", "fields", "separator"),
    [
        ("rows.csv", "prompt,completion\nquestion 0,1,000\nquestion 1,2,000\n", 2, 3, "comma"),
        ("rows.csv", "prompt,completion\nquestion 0,1,000,000\n", 2, 4, "comma"),
        ("rows.csv", "prompt,completion\nquestion 0,1,000\nquestion 1,2\n", 2, 3, "comma"),
        ("rows.csv", "prompt,completion\nquestion 0,1,\n", 2, 3, "comma"),
        ("rows.csv", '\ufeff"prompt\n",completion\n\nquestion 0,1,000\n', 4, 3, "comma"),
        ("rows.csv", 'prompt,completion\n"a\nb","1,000"\n\nquestion 1,2,000\n', 5, 3, "comma"),
        ("rows.csv", 'prompt,completion\r\n"a\r\nb",1\r\nquestion 1,2,000\r\n', 4, 3, "comma"),
        ("rows.csv", "prompt;completion\nquestion 0;1;000\n", 2, 3, "semicolon"),
        ("rows.csv", f"prompt,completion\n{'long' * 50_000},1,000\n", 2, 3, "comma"),
        ("rows.tsv", "prompt\tcompletion\nquestion 0\t1\t000\n", 2, 3, "tab"),
    ],
)
def test_a_row_with_more_fields_than_the_header_is_rejected(
    tmp_path: Path, name: str, content: str, line: int, fields: int, separator: str
) -> None:
    """pandas alone would read the first field of each row as its name, and ``000`` as the completion."""
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    limit = csv.field_size_limit()
    with pytest.raises(DataError) as error:
        read_rows(str(path))
    assert str(error.value).splitlines() == [
        f"{path}:{line}: the row has {fields} fields, but the header has 2.",
        f"  Quote fields that contain a {separator}, and name every column in the header.",
    ]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (["a\tb", 'say\t"Hello is a word', "c\td"], 3),
        (["a\tb", 'say\t"Hello is a word', 'c\t"d"'], 3),
        (['a\t"C\tD'], 2),
        (['"a\nb"\t"c\td"', 'e\t"f" g'], 4),
    ],
)
def test_a_field_of_a_tsv_file_that_is_not_quoted_correctly_is_refused(
    tmp_path: Path, lines: list[str], line: int
) -> None:
    """The lines after the first one would be part of its field, and the last one would lose its quotation marks."""
    path = tmp_path / "rows.tsv"
    path.write_text("\n".join(["prompt\tcompletion", *lines]) + "\n")
    with pytest.raises(DataError) as error:
        read_rows(str(path))
    assert str(error.value).splitlines() == [
        f"{path}:{line}: a field begins with a quotation mark, but is not quoted correctly.",
        "  Quote each field that contains a quotation mark, and write the quotation mark twice.",
    ]


def test_quoted_fields_of_a_tsv_file_may_contain_tabs_and_line_breaks(tmp_path: Path) -> None:
    """pandas writes indented code in this way. A quotation mark within a field that is not quoted is text."""
    rows = [{"prompt": 'Write "f"', "completion": 'def f(x):\n\treturn "x"'}]
    path = write(tmp_path / "rows.tsv", rows)
    with open(path, "a") as file:
        file.write('say "a"\tb"\n')
    assert list(read_rows(path)) == [*rows, {"prompt": 'say "a"', "completion": 'b"'}]


def test_fields_after_the_last_one_of_a_row_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a, b"\n"c\nd","1,000"\n')
    assert list(read_rows(str(path))) == [
        {"prompt": "a, b", "completion": None},
        {"prompt": "c\nd", "completion": "1,000"},
    ]


def test_a_local_file_has_no_subsets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.subset=small: .*rows\.jsonl is a local file"):
        read_rows(write(tmp_path / "rows.jsonl", ROWS), subset="small")


def test_a_folder_is_not_called_a_missing_file(tmp_path: Path) -> None:
    folder = tmp_path / "rows.jsonl"
    folder.mkdir()
    with pytest.raises(DataError) as error:
        read_rows(str(folder))
    fix = f"Name one of its files: data.train={folder}/<file>"
    assert str(error.value) == f"{folder} is a directory.\n  {fix}"


def test_an_unknown_hub_dataset_is_a_data_error() -> None:
    """Tests run offline. The message has the name and the overrides for a file and for a dataset."""
    with pytest.raises(DataError, match=r"nobody/nothing: neither a local file nor a Hub dataset.*\n.*data\.train="):
        read_rows("nobody/nothing")


def test_location_counts_lines_as_an_editor_does(tmp_path: Path) -> None:
    """Rows 0 and 1 are in lines 1 and 4, because blank lines count. Other formats have row numbers."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}\n')
    assert [location(str(path), row) for row in (0, 1)] == [f"{path}:1", f"{path}:4"]
    assert [row["a"] for row in read_rows(str(path))] == [1, 2]
    assert location("rows.csv", 0) == "rows.csv, row 1"
