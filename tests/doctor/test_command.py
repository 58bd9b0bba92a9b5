"""``stage=doctor`` as a whole: which data and which tokenizer it reads, its report and its exit code."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from contract.configs import compose_config
from rlhf.data import EncodedResponse
from rlhf.doctor import examine
from rlhf.doctor.command import data_sets, open_tokenizer
from rlhf.doctor.forms import Split
from rlhf.doctor.report import example
from rlhf.errors import ConfigError, DataError
from rlhf.export import save_result
from rlhf.stage import Result

PAIR = {"prompt": "It rains.", "chosen": "Yes.", "rejected": "No."}
BASIC = ("stage=doctor", "model.vocab_size=300")


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(tmp_path: Path, *overrides: str) -> int:
    cfg = compose_config(*BASIC, "data=jsonl", f"paths.root={tmp_path / 'outputs'}", *overrides)
    return examine(cfg, **{key: value for key, value in cfg.command.items() if key != "_target_"})


def test_clean_data_have_exit_code_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write(tmp_path / "train.jsonl", PAIR, {**PAIR, "prompt": "It snows."})
    before = sorted(tmp_path.rglob("*"))
    assert run(tmp_path, f"data.train={train}") == 0
    shown = capsys.readouterr().out
    for words in (
        "stage=reward, stage=dpo",
        "p50",
        "No error, 0 warnings.",
        "Answer:[[ Yes.<eos>]]",
        "Answer:[[ No.<eos>]]",
    ):
        assert words in shown
    assert "Findings" not in shown
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_brackets_replace_colors_that_are_switched_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write(tmp_path / "train.jsonl", PAIR)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(tmp_path, f"data.train={train}") == 0
    assert "[[" not in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(tmp_path, f"data.train={train}") == 0
    assert "[[ Yes.<eos>]]" in capsys.readouterr().out


def test_errors_have_exit_code_1_and_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swapped = {**PAIR, "chosen": "No.", "rejected": "Yes."}
    train = write(tmp_path / "t.jsonl", PAIR, swapped, *[{**PAIR, "chosen": ""}] * 5, {**PAIR, "chosen": "\x1b[2J"})
    val = write(tmp_path / "v.jsonl", PAIR)
    assert run(tmp_path, f"data.train={train}", f"data.val={val}", "command.places=2", "command.examples=0") == 1
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    for part in ("'chosen' and 'rejected' swapped", "also in the training data", "an empty response", "... and 3 more"):
        assert part in words
    assert "3 errors must be fixed before training" in shown
    assert "\x1b" not in shown
    assert "\\x1b[2J" in shown
    assert "[[" not in shown


def test_warnings_alone_have_exit_code_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, f"data.train={write(tmp_path / 't.jsonl', PAIR, PAIR)}") == 0
    assert "No error, 1 warning." in capsys.readouterr().out


def test_a_file_without_a_valid_row_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, f"data.train={write(tmp_path / 't.jsonl', {'text': 'a'})}") == 1
    assert "invalid: the prompt record has no field 'prompt'" in " ".join(capsys.readouterr().out.split())


def test_user_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^stage=doctor requires data, but data\.train is null"):
        run(tmp_path, "data.train=null")
    with pytest.raises(DataError, match="there is no such file"):
        run(tmp_path, "data.train=nowhere.jsonl")
    with pytest.raises(ConfigError, match=r"^command\.places must be an integer of at least 0, got -1"):
        run(tmp_path, "data.train=nowhere.jsonl", "command.places=-1")


def test_bundled_data_are_examined_as_a_whole_unless_a_file_is_given() -> None:
    """The prompts of the bundled data are its demonstrations, so that each file is read once."""
    bundled = data_sets(compose_config("stage=doctor"))
    assert {name: list(paths) for name, paths in bundled.items()} == {
        "demonstrations": ["train", "val"],
        "preferences": ["train", "val"],
        "heldout": ["test"],
    }
    assert data_sets(compose_config("stage=doctor", "data.val=x.jsonl")) == {"data": {"val": "x.jsonl"}}
    interpolated = compose_config("stage=doctor", "data=jsonl", "data.train=${run}.jsonl")
    assert data_sets(interpolated) == {"data": {"train": "rlhf.jsonl"}}


def test_the_tokenizer_is_that_of_the_model_of_the_run_or_of_the_data(tmp_path: Path, lm: Any, tokenizer: Any) -> None:
    """In this order: model=pretrained, the SFT model of the run, a new one."""
    overrides = (*BASIC, f"paths.root={tmp_path}")
    empty = Split("train", "empty.jsonl", [])
    assert open_tokenizer(compose_config(*overrides), empty)[1] is None
    save_result(Result(lm, tokenizer), tmp_path / "rlhf" / "sft" / "sft_final.pt", {})
    origin, found = open_tokenizer(compose_config(*overrides), empty)
    assert origin.endswith("sft_final.pt")
    assert found is not None
    assert found.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path / "base")
    pretrained = compose_config("stage=doctor", "model=pretrained", f"model.path={tmp_path / 'base'}", *overrides[2:])
    assert open_tokenizer(pretrained, empty)[0] == str(tmp_path / "base")


def test_the_loss_mask_is_shown_in_color(tokenizer: Any) -> None:
    """The response carries loss, its EOS included; without colors, brackets enclose it."""
    prompt, response = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("<bos>It", " rains.<eos>"))
    sequence = EncodedResponse(prompt + response, len(prompt))
    shown: Text = example(sequence, tokenizer, colored=True)
    assert shown.plain == "<bos>It rains.<eos>"
    assert [(span.start, span.end, span.style) for span in shown.spans] == [(7, 19, "green")]
    assert example(sequence, tokenizer, colored=False).plain == "<bos>It[[ rains.<eos>]]"
