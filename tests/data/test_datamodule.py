"""Data modules: splits, settings, encoded rows, templates and prompts."""

import json
import logging
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from rlhf.data import PreferenceDataModule, PromptDataModule, RecordDataModule, UnpairedDataModule
from rlhf.data.datamodule import DEFAULT_TEMPLATE
from rlhf.data.encode_split import encode_split
from rlhf.errors import ConfigError, DataError
from rlhf.sft import SFTDataModule

BOS, EOS = 1, 2
Write = Callable[..., str]
Demonstrations = Callable[[int], list[dict[str, str]]]


def attach_module(datamodule: RecordDataModule, **attributes: Any) -> RecordDataModule:
    """Give a data module a Trainer whose LightningModule has the given attributes."""
    datamodule.trainer = SimpleNamespace(lightning_module=SimpleNamespace(**attributes))
    return datamodule


@pytest.mark.parametrize("first", ["train", "val"])
def test_validation_is_held_out_of_train_if_there_is_no_file(
    write: Write, demonstrations: Demonstrations, first: str
) -> None:
    """20 records, 10 %: 2 for validation and the other 18 for training, whichever split is read first."""
    path = write(*demonstrations(20))

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


@pytest.mark.parametrize("label", [True, False])
def test_labels_that_are_all_the_same_are_reported(
    write: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, label: bool
) -> None:
    path = write(*({"prompt": f"Q{i}", "completion": f"A{i}", "label": label} for i in range(4)))
    UnpairedDataModule(train=path, val_fraction=0.0, tokenizer=tokenizer).encoded("train")
    assert f"every label is {str(label).lower()}, but KTO needs desirable and undesirable responses" in caplog.text


def test_special_tokens_in_texts_are_reported(
    write: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    path = write({"prompt": "Q", "target": "A"}, {"prompt": "Q", "target": f"A{tokenizer.eos_token} more"})
    data = SFTDataModule(train=path, val_fraction=0.0, tokenizer=tokenizer)
    data.encoded("train")
    expected = f"the texts of 1 records contain a special token, such as {tokenizer.eos_token} in {path}:2"
    assert expected in caplog.text


@pytest.mark.parametrize(("splits", "expected"), [(False, "<|eot|>"), (True, None)])
def test_special_tokens_of_a_template_are_reported(
    write: Write, tokenizer: PreTrainedTokenizerFast, splits: bool, expected: str | None
) -> None:
    """They are special tokens of ``tokenizer.json`` without a role, so that ``all_special_tokens`` lacks them."""
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("<|eot|>", special=True)])
    assert "<|eot|>" not in tokenizer.all_special_tokens
    tokenizer.split_special_tokens = splits
    data = SFTDataModule(train=write({"prompt": "Q", "completion": "A<|eot|>"}), val_fraction=0.0, tokenizer=tokenizer)
    _, summary = encode_split(data, "train")
    assert summary["first_special_token"] == (expected and (expected, 0))


def test_truncated_responses_and_a_large_batch_are_reported(
    write: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    path = write({"prompt": "Q", "target": "A long response of many words"})
    SFTDataModule(train=path, val_fraction=0.0, tokenizer=tokenizer, max_length=4).encoded("train")
    assert "1 of 1 responses are truncated. Raise data.max_length." in caplog.text
    assert f"data.batch_size=16 exceeds the 1 rows of {path}. Each batch has 1 rows." in caplog.text


def test_truncated_responses_are_counted_against_all_responses(
    write: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Three of the four responses to two prompts are truncated."""
    long = ["A long response", "Another long response", "One more long response"]
    rows = [
        {"prompt": "Q", "chosen": long[0], "rejected": long[1]},
        {"prompt": "R", "chosen": long[2], "rejected": "A"},
    ]
    PreferenceDataModule(train=write(*rows), val_fraction=0.0, tokenizer=tokenizer, max_length=8).encoded("train")
    assert "3 of 4 responses are truncated. Raise data.max_length." in caplog.text


def test_a_text_that_opens_sampled_responses_only_is_reported(
    write: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 20 responses, 19 do not begin with the text; 5 of all are held out. The training data are reported."""
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
    )
    path = write({"prompt": "Q", "target": "<think>\nA"}, *({"prompt": f"Q{i}", "target": "A"} for i in range(19)))
    data = SFTDataModule(train=path, val_fraction=0.25, tokenizer=tokenizer)
    data.setup("fit")
    missing = sum(record.response == "A" for record in data.records("train"))
    (message,) = (record.message for record in caplog.records if "opens a response" in record.message)
    assert message == (
        f"{path}: The chat template opens a response with '<think>\\n' when it is sampled, but not in {missing} of 15 "
        "responses of the data. Start the responses with that text, or set data.template."
    )


def test_responses_that_the_template_changes_are_reported(
    write: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}"
    rows = [{"prompt": f"Q{i}", "target": "<think>No.</think>A" if i < 2 else "A"} for i in range(5)]
    SFTDataModule(train=write(*rows), val_fraction=0.0, tokenizer=tokenizer).setup("fit")
    assert "The chat template changes the text of 2 of 5 responses, for example by removing reasoning." in caplog.text


def test_nothing_is_held_out_if_there_is_a_validation_file(write: Write, demonstrations: Demonstrations) -> None:
    train, val = write(*demonstrations(20)), write(*demonstrations(2), name="val.jsonl")
    data = SFTDataModule(train=train, val=val, val_fraction=0.5)
    assert (len(data.records("train")), len(data.records("val"))) == (20, 2)


@pytest.mark.parametrize(
    ("rows", "fraction", "warning"),
    [
        (1, 0.05, "5 % of 1 rows), so there are no validation metrics. Set data.val=<file>."),
        (3, 0.05, "5 % of 3 rows), so there are no validation metrics. Set data.val=<file> or data.val_fraction=0.34."),
        (4, 0.1, "10 % of 4 rows), so there are no validation metrics. Set data.val=<file> or data.val_fraction=0.25."),
        (10, 0.05, ""),
        (4, 0, ""),
    ],
)
def test_too_few_rows_for_validation_are_reported(
    write: Write,
    demonstrations: Demonstrations,
    caplog: pytest.LogCaptureFixture,
    rows: int,
    fraction: float,
    warning: str,
) -> None:
    """The suggested fraction leaves one row. With ``val_fraction=0``, validation is off on purpose."""
    path = write(*demonstrations(rows))
    data = SFTDataModule(train=path, val_fraction=fraction)
    assert bool(data.records("val")) == (rows == 10)
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert logged == ([f"{path}: no row is left for validation ({warning}"] if warning else [])
    if suggested := re.search(r"val_fraction=(0\.\d+)", warning):
        assert len(SFTDataModule(train=path, val_fraction=float(suggested[1])).records("val")) == 1


def test_a_split_without_data_has_no_records(write: Write, demonstrations: Demonstrations) -> None:
    data = SFTDataModule(train=write(*demonstrations(2)), val_fraction=0)
    assert (data.records("val"), data.records("test")) == ([], [])


@pytest.mark.parametrize(("stage", "split"), [("fit", "train"), ("test", "test")])
def test_a_stage_requires_its_split(stage: str, split: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.{split} must be .*\n  Set data\.{split}=<file>"):
        SFTDataModule().setup(stage)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size must be an integer of at least 1, got 0\.\n  Set data\.batch_size=16\."),
        ({"eval_batch_size": -2}, r"data\.eval_batch_size must be an integer of at least 1, got -2\."),
        ({"max_length": 1}, r"data\.max_length must be an integer of at least 2, got 1\."),
        ({"on_error": "ignore"}, r"data\.on_error must be stop or skip, got 'ignore'\.\n  Set data\.on_error=stop"),
        ({"loss_on": "prompt"}, r"data\.loss_on must be response, assistant, or all, got 'prompt'\."),
    ],
)
def test_invalid_settings_are_rejected(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SFTDataModule(**keys)


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_sft_loss_covers_the_response_or_everything(
    tokenizer: PreTrainedTokenizerFast, write: Write, demonstrations: Demonstrations, loss_on: str
) -> None:
    """' A0<eos>' follows the prompt; with loss_on=all, the loss covers all tokens but the first."""
    prompt, response = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("<bos>Q0\nSummary:", " A0<eos>")
    )
    data = SFTDataModule(train=write(*demonstrations(1)), val_fraction=0, loss_on=loss_on, tokenizer=tokenizer)
    (batch,) = data.train_dataloader()
    learned = batch.input_ids[batch.response_mask].tolist()
    assert batch.input_ids.tolist() == [[*prompt, *response]]
    assert learned == (response if loss_on == "response" else [*prompt[1:], *response])
    assert learned[-1] == EOS


@pytest.mark.parametrize(
    ("template", "has_chat_template", "prompt"),
    [("[{prompt}]", True, "[Q0]"), (None, True, "Q0\nSummary:"), (None, False, DEFAULT_TEMPLATE.format(prompt="Q0"))],
    ids=["data.template", "the tokenizer's template", "the default template"],
)
def test_order_of_precedence_of_templates(
    tokenizer: PreTrainedTokenizerFast,
    write: Write,
    demonstrations: Demonstrations,
    template: str | None,
    has_chat_template: bool,
    prompt: str,
) -> None:
    tokenizer.chat_template = tokenizer.chat_template if has_chat_template else None
    data = SFTDataModule(train=write(*demonstrations(1)), val_fraction=0, template=template, tokenizer=tokenizer)
    (row,) = data.encoded("train")
    assert tokenizer.decode(row.input_ids[: row.start]) == f"<bos>{prompt}"


def test_the_tokenizer_of_the_module_is_the_default(
    tokenizer: PreTrainedTokenizerFast, write: Write, demonstrations: Demonstrations
) -> None:
    data = attach_module(SFTDataModule(train=write(*demonstrations(1)), val_fraction=0), tokenizer=tokenizer)
    data.setup("fit")
    assert data.tokenizer is tokenizer
    assert len(data.encoded("train")) == 1


def test_a_data_module_without_any_tokenizer_is_an_error(write: Write, demonstrations: Demonstrations) -> None:
    data = SFTDataModule(train=write(*demonstrations(1)))
    with pytest.raises(ConfigError, match=r"needs a tokenizer.*\n  Pass a tokenizer to the data module"):
        data.encoded("train")


def test_truncated_and_dropped_rows_are_logged(
    tokenizer: PreTrainedTokenizerFast, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """With 10 tokens, pair 1 fits, pair 2 loses part of its prompt, and pair 3 is identical after truncation."""
    path = write(
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": "q" * 40, "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": "x" * 40 + "A", "rejected": "x" * 40 + "B"},
    )
    keys = {"max_length": 10, "val_fraction": 0, "template": "{prompt}:", "tokenizer": tokenizer}
    with caplog.at_level(logging.INFO, logger="rlhf"):
        rows = PreferenceDataModule(train=path, **keys).encoded("train")
    assert len(rows) == 2
    assert all(pair.chosen.input_ids[-1] == pair.rejected.input_ids[-1] == EOS for pair in rows)
    assert "2 rows, 1 dropped; 2 prompts and 2 responses truncated to fit 10 tokens" in caplog.text


def test_data_without_a_usable_record_are_an_error(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    path = write({"prompt": "Q", "chosen": "x" * 40 + "A", "rejected": "x" * 40 + "B"})
    data = PreferenceDataModule(train=path, max_length=10, val_fraction=0, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"can be used with data\.max_length=10\.\n  Set data\.max_length=20\."):
        data.encoded("train")


def test_sample_prompts_are_the_first_validation_prompts(
    tokenizer: PreTrainedTokenizerFast, write: Write, demonstrations: Demonstrations
) -> None:
    val = write(*demonstrations(5), name="val.jsonl")
    data = SFTDataModule(train=write(*demonstrations(9)), val=val, tokenizer=tokenizer)
    samples = data.sample_prompts(2)
    assert [tokenizer.decode(ids) for ids, _ in samples] == ["<bos>Q0\nSummary:", "<bos>Q1\nSummary:"]
    assert [prompt.raw_text for _, prompt in samples] == ["Q0", "Q1"]


def test_sample_prompts_get_at_least_half_of_max_length(
    tokenizer: PreTrainedTokenizerFast, write: Write, demonstrations: Demonstrations
) -> None:
    """The response budget of 64 exceeds max_length=12, so the prompt gets 6 tokens: BOS and its last 5."""
    data = SFTDataModule(train=write(*demonstrations(2)), val_fraction=0, max_length=12, tokenizer=tokenizer)
    complete = tokenizer("<bos>Q0\nSummary:", add_special_tokens=False)["input_ids"]
    ((ids, _),) = data.sample_prompts(1)
    assert ids == [BOS, *complete[-5:]]


def test_training_texts_are_prompts_and_responses(write: Write, demonstrations: Demonstrations) -> None:
    """A response begins with the space that the template writes before it."""
    train = write(*demonstrations(2))
    assert list(SFTDataModule(train=train, val=train).training_texts()) == ["Q0", " A0", "Q1", " A1"]


@pytest.mark.parametrize(
    ("row", "target"),
    [
        ({"document": "Q0", "target": "A"}, "A"),
        ({"prompt": "Q0", "chosen": "A", "rejected": "B"}, "A"),
        ({"messages": [{"role": "user", "content": "Q0"}, {"role": "assistant", "content": "A"}]}, "A"),
        ({"prompt": "Q0"}, None),
    ],
)
def test_prompts_are_read_from_records_of_any_kind(write: Write, row: dict[str, Any], target: str | None) -> None:
    (prompt,) = PromptDataModule(train=write(row), val_fraction=0).records("train")
    assert (prompt.raw_text, prompt.target) == ("Q0", target)


def test_prompts_leave_the_response_budget_of_the_module_free(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    """max_length=20 and a response budget of 12 leave 8 tokens for the prompt: BOS and its last 7."""
    data = PromptDataModule(train=write({"prompt": "x" * 50}), val_fraction=0, max_length=20, tokenizer=tokenizer)
    (row,) = attach_module(data, response_budget=12).encoded("train")
    complete = tokenizer("<bos>" + "x" * 50 + "\nSummary:", add_special_tokens=False)["input_ids"]
    assert row.input_ids == [BOS, *complete[-7:]]


def test_a_response_budget_without_room_for_a_prompt_is_rejected(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    data = PromptDataModule(train=write({"prompt": "x"}), val_fraction=0, max_length=12, tokenizer=tokenizer)
    message = r"data\.max_length must be greater than .*max_new_tokens \(12\), got 12\..*\n  Set data\.max_length=24\."
    with pytest.raises(ConfigError, match=message):
        attach_module(data, response_budget=12).encoded("train")


def test_has_margins_reports_whether_the_data_specify_margins(write: Write) -> None:
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    for rows, expected in (([row], False), ([row, {**row, "margin": 2.0}], True)):
        assert PreferenceDataModule(train=write(*rows), val_fraction=0).has_margins is expected


def test_batches_know_the_lines_of_their_rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Line 2 is blank and line 4 no record, so the three rows are on lines 1, 3 and 5, in any order."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": "Q" * size, "completion": "A"}) for size in (9, 5, 1)]
    path.write_text("\n".join([lines[0], "", lines[1], json.dumps({"completion": "A"}), lines[2]]) + "\n")
    data = SFTDataModule(train=str(path), val_fraction=0, batch_size=1, on_error="skip", tokenizer=tokenizer)
    found = {batch.token_count: data.locations(batch) for batch in data.loader("train", training=True)}
    assert [found[tokens] for tokens in sorted(found)] == [[f"{path}:5"], [f"{path}:3"], [f"{path}:1"]]


def test_both_rows_of_a_pair_have_its_line(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    """KTO counts a pair as two rows. The held-out pairs are left out."""
    pairs = [{"prompt": f"Q{n}", "chosen": "A", "rejected": "B"} for n in range(4)]
    data = UnpairedDataModule(train=write(*pairs), val_fraction=0.5, batch_size=4, tokenizer=tokenizer)
    (batch,) = data.loader("train", training=True)
    held_out = {record.prompt.row for record in data.records("val")}
    assert sorted(batch.rows) == sorted([row for row in range(4) if row not in held_out] * 2)
