"""Overrides of Hydra whose values may contain any character."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from rlhf.overrides import leaves, quote, to_override

TEXTS = ["it's", "a\\b", "a\\'b", "a\\\\", "it's\\", "a b", "a,b=c", "{a: [b]}", "ä", "~/a", "-a", "/a/b:c@d+1.2"]
TEXTS += ['"go"', '{p}\n\\"', "null", "False", "1_000", "-1e5", "inf"]


@pytest.mark.parametrize("text", TEXTS)
def test_hydra_reads_the_text_again(text: str) -> None:
    for override in (f"key={quote(text)}", "key=" + quote(text, '"'), to_override("key", text)):
        value = OverridesParser.create().parse_override(override).value()
        assert getattr(value, "text", value) == text


def test_hydra_reads_other_values_again() -> None:
    values = [None, True, 3, 1e-05, [], [0.9, None, "a, b", Path("/c/d"), "it's"]]
    parsed = [OverridesParser.create().parse_override(to_override("key", value)).value() for value in values]
    texts = [getattr(item, "text", item) for item in parsed.pop()]
    assert (parsed, texts) == (values[:-1], [0.9, None, "a, b", "/c/d", "it's"])


@pytest.mark.parametrize("text", ["outputs/run_1", "a b"])
def test_a_plain_value_has_no_quotes(text: str) -> None:
    assert to_override("run", text) == f"run={text}"


def test_leaves_by_hand() -> None:
    """A list is one value, and an empty node has none."""
    config = {"stage": {"beta": 0.1, "models": {"sft": None}, "empty": {}}, "seed": 1, "loggers": ["csv"]}
    assert dict(leaves(config)) == {"stage.beta": 0.1, "stage.models.sft": None, "seed": 1, "loggers": ["csv"]}
