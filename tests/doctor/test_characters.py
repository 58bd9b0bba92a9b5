"""Traces of damaged encodings in texts."""

import json
from collections.abc import Callable

import pytest

from rlhf.doctor.characters import kinds_in, odd_characters
from rlhf.doctor.forms import Split
from rlhf.printable import printable


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (
            "caf\u00e9 \u2019s \u00c3O \u00c2ge \u00e2me 5 \u20ac \U0001f600 \u4e2d \u05d0\u200f",
            set(),
        ),  # correct texts in many scripts
        ("tab\tline\nreturn\r", set()),
        ("bytes \ufffd", {"replacement"}),
        ("nul \x00", {"control"}),
        ("terminal \x1b[31m", {"control"}),
        ("C1 \x85", {"control"}),
        ("in\ufeffside", {"bom"}),
        *(
            (text.encode().decode("cp1252"), {"mojibake"})
            for text in ("caf\u00e9", "it\u2019s", "5 \u00b0C", "\u00fc", "\U0001f600")
        ),
        ("\u00e9".encode().decode("latin-1") + "\x00", {"mojibake", "control"}),
    ],
)
def test_kinds_of_odd_characters(text: str, kinds: set[str]) -> None:
    assert kinds_in({"prompt": "fine", "response": text}).keys() == kinds


def test_a_row_is_listed_once_per_kind_with_its_field(split: Callable[..., Split]) -> None:
    pair = {"prompt": "a", "chosen": "x\x00y\x00", "rejected": "z\x00"}
    found = odd_characters(split(pair, {**pair, "chosen": "x\ufffd"}))
    assert [len(finding.locations) for finding in found] == [1, 2]
    assert found[1].locations[0].endswith("train.jsonl:1 (chosen: 'x\x00y\x00')")


def test_escaped_text_is_harmless_and_can_be_encoded() -> None:
    shown = printable("a\x1b[2J\x00\ud800\r\u009b b\n\u00e9\u00a0")
    assert shown == "a\\x1b[2J\\x00\\ud800\\r\\x9b b\n\u00e9\u00a0"
    assert json.loads(json.dumps(shown)).encode()
    family, persian = "\U0001f469\u200d\U0001f467", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    assert printable(f"{family} {persian} \u200e") == f"{family} {persian} \\u200e", "joiners are parts of words"
    assert printable("a" * 5 + "b" * 5, limit=4) == "aa ... bb"
