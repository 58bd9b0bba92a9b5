"""Rows from files of every format, and where a broken one breaks."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rlhf.data.files import location, read_rows
from rlhf.errors import UserError

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


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "JSONL"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    """Commas, quotes, line feeds inside a field and letters beyond ASCII come through."""
    path = write(tmp_path / f"rows.{ending.lower()}", ROWS)
    path = str(Path(path).rename(tmp_path / f"rows.{ending}"))
    rows = read_rows(path)
    assert [rows[i] for i in range(len(rows))] == ROWS


def test_nested_messages_come_through(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}]
    assert list(read_rows(write(tmp_path / "talk.jsonl", rows))) == rows


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    """The cache of the datasets library must not answer with yesterday's rows."""
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert len(read_rows(path)) == 3
    write(tmp_path / "rows.jsonl", ROWS[:1])
    assert len(read_rows(path)) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("[1, 2]", "one JSON object"),
        ('{"prompt": 5}', "'prompt' is int, but str in line 1"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    """Line 3 of the file, the blank line 2 counted."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n\n{line}\n{{"prompt": "b"}}\n')
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: .*{reason}"):
        read_rows(str(path))


def test_a_file_that_is_not_utf8_says_so(tmp_path: Path) -> None:
    """Also where the reader only stumbles over the bytes once the row is asked for."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "straße"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"rows\.jsonl: not UTF-8"):
        list(read_rows(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", None, r"rows\.jsonl: no such file"),
        ("rows.jsonl", "", r"rows\.jsonl: the file is empty"),
        ("rows.txt", "hello", r"rows\.txt: cannot tell its format from '\.txt'\n.*\.jsonl"),
        ("rows.parquet", "hello", r"rows\.parquet: cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_rows(str(tmp_path / name))


def test_a_hub_name_that_cannot_be_reached_is_a_user_error() -> None:
    """Offline, as every test is: the name and what to type."""
    with pytest.raises(
        UserError, match=r"nobody/nothing: neither a file here nor a data set of the hub.*\n.*data\.train="
    ):
        read_rows("nobody/nothing")


def test_where_counts_lines_as_an_editor_does(tmp_path: Path) -> None:
    """Rows 0 and 1 stand in lines 1 and 4: blank lines count; other formats have rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}\n')
    assert [location(str(path), row) for row in (0, 1)] == [f"{path}:1", f"{path}:4"]
    assert [row["a"] for row in read_rows(str(path))] == [1, 2]
    assert location("rows.csv", 0) == "rows.csv, row 1"
