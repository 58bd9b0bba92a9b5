"""Overrides of Hydra whose values may contain any character."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from rlhf.overrides import leaves, quote, to_override

TEXTS = ["it's", "a\\b", "a\\'b", "a\\\\", "it's\\", "a b", "a,b=c", "{a: [b]}", "ä", "~/a", "-a", "/a/b:c@d+1.2"]


@pytest.mark.parametrize("text", TEXTS)
def test_hydra_reads_the_text_again(text: str) -> None:
    for override in (f"key={quote(text)}", to_override("key", text)):
        value = OverridesParser.create().parse_override(override).value()
        assert getattr(value, "text", value) == text


@pytest.mark.parametrize("text", ["outputs/run_1", "a b"])
def test_a_plain_value_has_no_quotes(text: str) -> None:
    assert to_override("run", text) == f"run={text}"


def test_leaves_by_hand() -> None:
    """A list is one value, and an empty node has none."""
    config = {"stage": {"beta": 0.1, "models": {"sft": None}, "empty": {}}, "seed": 1, "loggers": ["csv"]}
    assert dict(leaves(config)) == {"stage.beta": 0.1, "stage.models.sft": None, "seed": 1, "loggers": ["csv"]}
