"""Plain text, split into a prompt and a completion as the documentation describes."""

import json
import shlex
from pathlib import Path

import pytest
from hydra.utils import instantiate
from transformers import PreTrainedTokenizerFast

from contract.configs import ROOT, compose_config
from contract.documents import commands, fenced_blocks, overrides_of
from rlhf.data.hints import PLAIN_TEXT_OF_SFT

TEXTS = ["The bridge opens.\n\nIt  rains: 90 euros", "May\n in Whitby", " Grüße aus\tdem Süden "]
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_split_texts_have_the_tokens_of_the_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole text with BOS and EOS. All tokens carry loss, except the first one, which nothing precedes."""
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    exec(dict(fenced_blocks(DATA, "python"))["split_texts.py"], {})
    (command,) = (each for each in commands(DATA) if "split_texts.jsonl" in each)
    cfg = compose_config(*overrides_of(command), "data.val_fraction=0")
    data = instantiate(cfg.data, tokenizer=tokenizer)
    expected = [
        [
            tokenizer.bos_token_id,
            *tokenizer(text.strip(), add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        for text in TEXTS
    ]
    assert [row.input_ids for row in data.encoded("train")] == expected
    assert [row.spans for row in data.encoded("train")] == [[(1, len(input_ids))] for input_ids in expected]


def test_the_message_for_plain_text_suggests_the_same_overrides() -> None:
    (command,) = (each for each in commands(DATA) if "split_texts.jsonl" in each)
    suggested = shlex.split(PLAIN_TEXT_OF_SFT[PLAIN_TEXT_OF_SFT.index("'data.template") :])
    assert suggested == overrides_of(command)[-2:]
