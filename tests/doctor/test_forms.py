"""The form of each row, and rows that are broken in every way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class

from contract.configs import compose_config
from rlhf.data import Demonstration, Preference, Prompt, Rating, RecordDataModule, UnpairedPreference
from rlhf.data.forms import FORMS, form_of
from rlhf.data.parser import RecordParser
from rlhf.data.reading import RecordReader
from rlhf.data.records import Record
from rlhf.doctor.forms import Split, read_split
from rlhf.stages import stages

CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, Preference),
        ({"prompt": "a", "chosen": "b", "loser": "c"}, Preference),  # invalid, but not a prompt
        ({"prompt": "a", "completion": "b", "label": False}, UnpairedPreference),
        ({"prompt": "a", "response": "b", "label": True}, UnpairedPreference),
        ({"prompt": "a", "response": "b", "reward": 0.0}, Rating),
        ({"prompt": "a", "response": "b"}, Rating),
        ({"document": "a", "target": "b"}, Demonstration),
        ({"prompt": "a", "completion": "b"}, Demonstration),
        ({"messages": CONVERSATION}, Demonstration),
        ({"instruction": "a", "output": "b"}, Demonstration),
        ({"messages": CONVERSATION[:1]}, Prompt),
        ({"prompt": "a", "chosen": None}, Prompt),  # a column that this row does not use
        ({"text": "a"}, Prompt),
    ],
)
def test_fields_determine_the_form(row: dict[str, Any], form: type[Record]) -> None:
    assert form_of(RecordParser(), row) is form


def test_renamed_columns_are_recognized() -> None:
    parser = RecordParser({"rejected": "loser", "prompt": "question"})
    assert form_of(parser, {"question": "a", "loser": "c"}) is Preference


@pytest.mark.parametrize(
    "overrides", [(f"stage={name}",) for name in stages()] + [("stage=dpo", "loss=kto")], ids=" ".join
)
def test_forms_name_every_stage_that_reads_them(overrides: tuple[str, ...]) -> None:
    """The first form of a data module is its own. Others are accepted only, as the pairs that KTO splits."""
    datamodule: type[RecordDataModule] = get_class(compose_config(*overrides).data._target_)
    for form in datamodule.record_types[: 1 if "loss=kto" in overrides else None]:
        assert " ".join(overrides) in FORMS[form][1].split(", ")


def test_a_broken_row_does_not_hide_the_others(split: Callable[..., Split]) -> None:
    """Blank lines count as lines. Each invalid row has its own reason."""
    found = split(
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        b"{oops\n",
        b"\n",
        b"[1]\n",
        b'{"prompt": "\xff"}\n',
        b"[" * 100_000 + b"\n",
        {"prompt": "a", "chosen": "b", "loser": "c"},
        b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1' + b"0" * 400 + b"}\n",
        {"prompt": "last"},
    )
    assert [entry.number for entry in found.entries] == [1, 9]
    reasons = {row.number: row.reason for row in found.invalid}
    assert list(reasons) == [2, 4, 5, 6, 7, 8]
    for number, words in {
        2: "not JSON",
        4: "JSON object, got list",
        5: "not UTF-8",
        6: "JSON",
        7: "'rejected'",
    }.items():
        assert words in reasons[number]
    assert found.invalid[4].missing == "rejected"
    assert found.location(7).endswith("train.jsonl:7")


def test_other_files_are_read_by_row(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\na,b,b\nd,e,f\n")
    found = read_split("train", str(path), RecordReader(RecordParser(), max_rows=2))
    assert [entry.number for entry in found.entries] == [1]
    assert found.location(found.invalid[0].number) == f"{path}, row 2"
    assert found.short_location(2) == "row 2"


def test_a_field_that_is_specified_twice_is_invalid(split: Callable[..., Split]) -> None:
    row = {"prompt": "a", "completion": "b"}
    found = split(row, b'{"prompt": "a", "prompt": "b", "completion": "c"}\n')
    assert [(row.number, row.reason) for row in found.invalid] == [(2, "the field 'prompt' is specified twice")]


def test_a_byte_order_mark_at_the_start_of_a_file_is_accepted(split: Callable[..., Split]) -> None:
    """The reader of training accepts it, too."""
    found = split(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\n')
    assert (len(found.entries), found.invalid) == (1, [])
