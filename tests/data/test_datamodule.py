"""From a file to batches: what is read, what is refused and how, what is left out and counted."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from transformers import PreTrainedTokenizerFast

from rlhf.data import Demonstration, Preference, PreferenceDataModule, Prompt, PromptDataModule, Rating
from rlhf.data.datamodule import RecordDataModule
from rlhf.data.records import FIELDS
from rlhf.errors import UserError
from rlhf.reward import RewardDataModule
from rlhf.sft import SFTDataModule
from test_configs import composed

BOS, EOS = 1, 2


def write(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def demonstrations(count: int) -> list[dict[str, str]]:
    return [{"document": f"Q{i}", "target": f"A{i}"} for i in range(count)]


def ready(data: RecordDataModule, tokenizer: PreTrainedTokenizerFast) -> RecordDataModule:
    data.tokenizer = tokenizer
    return data


def test_rows_become_records_in_file_order(tmp_path: Path) -> None:
    data = SFTDataModule(train=write(tmp_path, *demonstrations(3)), val_fraction=0)
    assert data.records("train") == [
        Demonstration(Prompt([{"role": "user", "content": f"Q{i}"}], f"Q{i}"), f"A{i}") for i in range(3)
    ]
    assert data.records("val") == []


def test_a_missing_field_names_file_line_field_and_override(tmp_path: Path) -> None:
    """Line 3, the blank line 2 counted: what is there, what to type, what is expected."""
    path = tmp_path / "prefs.jsonl"
    good = json.dumps({"prompt": "Q", "chosen": "A", "rejected": "B"})
    path.write_text(f'{good}\n\n{{"prompt": "Q", "chosen": "A", "loser": "B"}}\n')
    with pytest.raises(UserError) as caught:
        PreferenceDataModule(train=str(path)).records("train")
    assert str(caught.value) == (
        f"{path}:3: preference record has no 'rejected'; its fields are 'prompt', 'chosen', 'loser'.\n"
        "  If the column only has another name: data.columns.rejected=loser\n"
        '  Expected form: {"prompt": "...", "chosen": "...", "rejected": "..."}\n'
        "  To leave such records out: data.on_error=skip"
    )


def test_the_override_names_a_column_that_is_filled(tmp_path: Path) -> None:
    """Other rows have a margin, this one does not: its empty 'margin' is no candidate for 'rejected'."""
    path = write(
        tmp_path,
        {"prompt": "Q", "chosen": "A", "loser": "B"},
        {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 1.0},
    )
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*'loser'\.\n.*data\.columns\.rejected=loser\n"):
        PreferenceDataModule(train=path).records("train")


def test_the_override_that_is_named_works(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "Q", "chosen": "A", "loser": "B"})
    data = PreferenceDataModule(train=path, columns={"rejected": "loser"}, val_fraction=0)
    assert data.records("train") == [Preference(Prompt([{"role": "user", "content": "Q"}], "Q"), "A", "B")]


@pytest.mark.parametrize("data", ["demo", "jsonl", "hub"])
def test_the_configuration_declares_every_field(data: str) -> None:
    """``data.columns.<field>`` can be typed for each field of a record, and is null by default."""
    cfg = composed("stage=dpo", f"data={data}")
    assert dict(cfg.data.columns) == dict.fromkeys(FIELDS)


@pytest.mark.parametrize("stage", ["reward", "dpo"])
@pytest.mark.parametrize("choice", ["demo", "jsonl"])
def test_the_override_of_the_hint_can_be_typed(tmp_path: Path, stage: str, choice: str) -> None:
    """The configuration as ``train.py`` composes it: refused records, then the override that the error names."""
    path = write(tmp_path, {"prompt": "Q", "chosen": "A", "loser": "B"})
    typed = (f"stage={stage}", f"data={choice}", "data.val=null", "data.val_fraction=0")
    with pytest.raises(UserError) as caught:
        instantiate(composed(*typed).data, train=path).records("train")
    override = re.search(r"data\.columns\.\S+", str(caught.value)).group()
    assert override == "data.columns.rejected=loser"
    data = instantiate(composed(*typed, override).data, train=path)
    assert data.records("train") == [Preference(Prompt([{"role": "user", "content": "Q"}], "Q"), "A", "B")]


def test_a_column_for_an_unknown_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.columns\.reject=loser: 'reject' is not a field of a record"):
        PreferenceDataModule(train=write(tmp_path, *demonstrations(1)), columns={"reject": "loser"})


def test_five_errors_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    """7 of 9 rows are broken: 5 lines and the rest in a number."""
    path = write(tmp_path, *demonstrations(2), *({"document": f"Q{i}", "target": ""} for i in range(7)))
    with pytest.raises(UserError) as caught:
        SFTDataModule(train=path).records("train")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:5]] == [f"{path}:{number}" for number in range(3, 8)]
    assert lines[5] == "... and 2 more of 9 records."


def test_rows_of_a_table_are_named_by_row(tmp_path: Path) -> None:
    """CSV fields may hold line feeds, so that a line says little: row 2, the header not counted."""
    path = tmp_path / "rows.csv"
    path.write_text('document,target\n"two\nlines",A\nQ,\n')
    with pytest.raises(UserError, match=r"rows\.csv, row 2: demonstration record has no 'target'"):
        SFTDataModule(train=str(path)).records("train")


def test_skipped_records_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """2 of 5 rows cannot be used: 3 are left, and the log says so and shows the first."""
    rows = demonstrations(3)
    path = write(tmp_path, rows[0], {"document": "Q"}, rows[1], {"document": "", "target": "A"}, rows[2])
    data = SFTDataModule(train=path, on_error="skip", val_fraction=0)
    with caplog.at_level(logging.INFO, logger="rlhf"):
        assert [record.response for record in data.records("train")] == ["A0", "A1", "A2"]
    assert f"{path}: 2 records dropped, the first: {path}:2: demonstration record has no 'target'" in caplog.text
    assert "3 records read, 2 dropped" in caplog.text


def test_a_file_of_nothing_usable_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record that can be used"):
        SFTDataModule(train=write(tmp_path, {"document": "Q"}), on_error="skip").records("train")


def test_ratings_and_pairs_are_told_apart_by_the_first_row(tmp_path: Path) -> None:
    rating = {"prompt": "Q", "response": "A", "reward": 0.5}
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    for row, form in ((rating, Rating), (pair, Preference)):
        (record,) = RewardDataModule(train=write(tmp_path, row), val_fraction=0).records("train")
        assert type(record) is form


def test_max_rows_reads_the_first_ones_only(tmp_path: Path) -> None:
    """The broken fourth row is never looked at."""
    path = write(tmp_path, *demonstrations(3), {"document": "Q"})
    assert len(SFTDataModule(train=path, max_rows=2, val_fraction=0).records("train")) == 2


@pytest.mark.parametrize("first", ["train", "val"])
def test_val_is_held_out_of_train_when_there_is_none(tmp_path: Path, first: str) -> None:
    """20 rows, 10 %: 2 for validation and 18 others for training, the same ones each time, whatever is asked first."""
    path = write(tmp_path, *demonstrations(20))

    def split(first: str, seed: int = 0) -> tuple[list[str], list[str]]:
        data = SFTDataModule(train=path, val_fraction=0.1, seed=seed)
        order = ("train", "val") if first == "train" else ("val", "train")
        found = {name: [record.response for record in data.records(name)] for name in order}
        return found["train"], found["val"]

    train, val = split(first)
    assert (len(train), len(val)) == (18, 2)
    assert {*train, *val} == {f"A{i}" for i in range(20)}
    assert split("train") == (train, val)
    assert split("train", seed=1) != (train, val)


def test_a_val_file_leaves_train_whole(tmp_path: Path) -> None:
    train, val = write(tmp_path, *demonstrations(20)), write(tmp_path, *demonstrations(2), name="val.jsonl")
    data = SFTDataModule(train=train, val=val, val_fraction=0.5)
    assert (len(data.records("train")), len(data.records("val"))) == (20, 2)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"batch_size": 0}, "data.batch_size"),
        ({"eval_batch_size": 0}, "data.eval_batch_size"),
        ({"max_length": 1}, "data.max_length"),
        ({"on_error": "ignore"}, "data.on_error=ignore is none of stop, skip"),
        ({"loss_on": "prompt"}, "data.loss_on=prompt is none of answer, text"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        SFTDataModule(**keys)


def test_sft_batches_carry_the_loss_of_the_answer_and_its_eos(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """' A0<eos>' after 'Q0', template and BOS; with loss_on=text all but the first token."""
    path = write(tmp_path, *demonstrations(1))
    opening, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("<bos>Q0\nSummary:", " A0<eos>")
    )
    for loss_on, learned in (("answer", answer), ("text", [*opening[1:], *answer])):
        data = ready(SFTDataModule(train=path, val_fraction=0, loss_on=loss_on), tokenizer)
        (batch,) = data.train_dataloader()
        assert batch.input_ids.tolist() == [[*opening, *answer]]
        assert batch.input_ids[batch.response_mask].tolist() == learned
        assert learned[-1] == EOS


def test_the_template_of_the_data_goes_before_the_tokenizers(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """data.template, else the tokenizer's own, else a plain one."""
    path = write(tmp_path, *demonstrations(1))
    for template, own, opening in (
        ("[{prompt}]", tokenizer.chat_template, "[Q0]"),
        (None, tokenizer.chat_template, "Q0\nSummary:"),
        (None, None, "Q0\n\nAnswer:"),
    ):
        tokenizer.chat_template = own
        data = ready(SFTDataModule(train=path, val_fraction=0, template=template), tokenizer)
        (row,) = data.encoded("train")
        assert tokenizer.decode(row.input_ids[: row.start]) == f"<bos>{opening}"


def test_cut_and_dropped_rows_are_logged(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """10 tokens: pair 1 fits, pair 2 loses its prompt's beginning, pair 3 differs beyond the cut only: dropped."""
    path = write(
        tmp_path,
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": "q" * 40, "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": "x" * 40 + "A", "rejected": "x" * 40 + "B"},
    )
    data = ready(PreferenceDataModule(train=path, max_length=10, val_fraction=0, template="{prompt}:"), tokenizer)
    with caplog.at_level(logging.INFO, logger="rlhf"):
        rows = data.encoded("train")
    assert len(rows) == 2
    assert all(pair.chosen.input_ids[-1] == pair.rejected.input_ids[-1] == EOS for pair in rows)
    assert "2 rows, 1 dropped, 2 prompts and 2 answers cut to 10 tokens" in caplog.text


def test_nothing_that_fits_is_an_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "Q", "chosen": "x" * 40 + "A", "rejected": "x" * 40 + "B"})
    data = ready(PreferenceDataModule(train=path, max_length=10, val_fraction=0), tokenizer)
    with pytest.raises(UserError, match=r"no record fits into data\.max_length=10.*\n.*data\.max_length=20"):
        data.encoded("train")


def test_samples_are_validation_prompts_ready_to_be_answered(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The prompt without its answer, as many as asked for."""
    val = write(tmp_path, *demonstrations(5), name="val.jsonl")
    data = ready(SFTDataModule(train=write(tmp_path, *demonstrations(9)), val=val), tokenizer)
    samples = data.sample_prompts(2)
    assert [tokenizer.decode(tokens) for tokens, _ in samples] == ["<bos>Q0\nSummary:", "<bos>Q1\nSummary:"]
    assert [prompt.raw_text for _, prompt in samples] == ["Q0", "Q1"]


def test_samples_of_short_texts_keep_a_prompt(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """12 tokens in all are fewer than an answer may take: half of them are left to the prompt, BOS and its end."""
    data = ready(SFTDataModule(train=write(tmp_path, *demonstrations(2)), val_fraction=0, max_length=12), tokenizer)
    whole = tokenizer("<bos>Q0\nSummary:", add_special_tokens=False)["input_ids"]
    ((tokens, _),) = data.sample_prompts(1)
    assert tokens == [BOS, *whole[-5:]]


def test_texts_for_a_tokenizer_are_prompts_and_answers_of_train(tmp_path: Path) -> None:
    """Answers with the space that the template writes before them."""
    train = write(tmp_path, *demonstrations(2))
    assert list(SFTDataModule(train=train, val=train).training_texts()) == ["Q0", " A0", "Q1", " A1"]


@pytest.mark.parametrize(
    "row",
    [
        {"document": "Q0", "target": "A"},
        {"prompt": "Q0", "chosen": "A", "rejected": "B"},
        {"messages": [{"role": "user", "content": "Q0"}, {"role": "assistant", "content": "A"}]},
        {"prompt": "Q0"},
    ],
)
def test_prompts_are_read_from_any_form(tmp_path: Path, row: dict[str, Any]) -> None:
    (prompt,) = PromptDataModule(train=write(tmp_path, row), val_fraction=0).records("train")
    assert (prompt.raw_text, prompt.target) == ("Q0", "A" if len(row) > 1 or "messages" in row else None)
