"""Rows as columns of Arrow, and their cache: the same rows as without it, read again only for the same content."""

import hashlib
import logging
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from harness import EXACT, PAIRS, TinyRun, one_architecture
from ranks import in_ranks
from rlhf.data import Encoder, PreferenceDataModule, RecordDataModule
from rlhf.data.cache import source_of_class
from rlhf.data.rows import RowList, RowTable
from rlhf.errors import ConfigError, DataError
from rlhf.sft import SFTDataModule

Write = Callable[..., str]
ALL_STAGES = ("sft", "reward", "dpo", "kto", "ppo")


@pytest.fixture
def always_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat few rows as many: 3 rows per record batch."""
    for name, value in {
        "reading.CACHED_ROWS": 1,
        "encode_split.CACHED_ROWS": 1,
        "encode_split.ENCODED_RECORDS": 4,
        "rows.BATCH_ROWS": 3,
        "row_files.BATCH_ROWS": 3,
    }.items():
        monkeypatch.setattr(f"rlhf.data.{name}", value)


@pytest.fixture
def fails_to_encode(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which encoding more than the one record that determines the type of the rows fails."""

    def forbid() -> None:
        monkeypatch.setattr(Encoder, "prepare", lambda *_: pytest.fail("the records were encoded again"))

    return forbid


def sft(write: Write, tokenizer: PreTrainedTokenizerFast, cache: Path | None, **keys: Any) -> SFTDataModule:
    rows = [{"prompt": f"Q{i}" * (i + 1), "completion": f"A{i}"} for i in range(8)]
    keys = {"val_fraction": 0.25, "cache_dir": None if cache is None else str(cache), **keys}
    return SFTDataModule(train=keys.pop("train", None) or write(*rows), tokenizer=tokenizer, **keys)


def content(batch: Any) -> Any:
    """The fields of a batch as objects that can be compared."""
    fields = vars(batch).items()
    return {
        name: value.tolist()
        if isinstance(value, torch.Tensor)
        else content(value)
        if hasattr(value, "indices")
        else value
        for name, value in fields
    }


def batches(tiny_run: TinyRun, stage: str, **keys: Any) -> tuple[RecordDataModule, list[Any]]:
    run = tiny_run.build(stage, data={"batch_size": 2, "cache_dir": None, **keys})
    run.trainer.strategy.connect(run.module)
    run.datamodule.trainer = run.trainer
    return run.datamodule, [content(batch) for batch in run.datamodule.loader("train", training=True)]


@one_architecture
@pytest.mark.parametrize("stage", ALL_STAGES)
def test_batches_are_the_same_with_columns(
    tiny_run: TinyRun, stage: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """As objects, as columns in memory, as columns that are written to disk, and as columns that are read from it."""
    data, expected = batches(tiny_run, stage)
    assert isinstance(data.encoded("train"), RowList)
    request.getfixturevalue("always_cached")
    request.getfixturevalue("fails_to_encode")
    in_memory, found = batches(tiny_run, stage)
    assert isinstance(in_memory.encoded("train"), RowTable)
    assert found == expected
    for attempt in range(2):
        if attempt == 1:
            request.getfixturevalue("fails_to_encode")()
        _, found = batches(tiny_run, stage, cache_dir=str(tmp_path / "cache"))
        assert found == expected
    assert len(list((tmp_path / "cache").glob("rows-*.arrow"))) == 1


@pytest.mark.usefixtures("always_cached")
def test_conversations_are_read_as_they_were_stored(
    write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, fails_to_encode: Callable[[], None]
) -> None:
    """Rows with 0 to 7 assistant messages before the last one."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    path = write(*({"messages": turns * count} for count in range(1, 9)))
    keys = {"train": path, "val_fraction": 0.0, "loss_on": "assistant"}
    expected = list(sft(write, tokenizer, tmp_path / "cache", **keys).encoded("train"))
    fails_to_encode()
    rows = sft(write, tokenizer, tmp_path / "cache", **keys).encoded("train")
    assert list(rows) == expected
    assert [len(row.spans) for row in rows] == list(range(1, 9))


@pytest.mark.usefixtures("always_cached")
def test_slices_and_negative_indices(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = sft(write, tokenizer, None, val_fraction=0.0).encoded("train")
    every = list(rows)
    assert (rows[-1], rows[1:7:2], len(rows)) == (every[7], every[1:7:2], 8)
    assert rows.numbers.tolist() == list(range(8))
    with pytest.raises(IndexError, match="index 8 of 8 items"):
        rows[8]


@pytest.mark.usefixtures("always_cached")
@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 12},
        {"template": "{prompt}?"},
        {"loss_on": "all"},
        {"loss_on": "assistant"},
        {"seed": 1},
        {"train": "other"},
    ],
)
def test_other_settings_are_encoded_again(
    write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Among them another file, and another choice of held-out rows."""
    if "train" in change:
        change = {"train": write(*({"prompt": f"Q{i}", "completion": "B"} for i in range(8)), name="other.jsonl")}
    before = list(sft(write, tokenizer, tmp_path / "cache").encoded("train"))
    again = list(sft(write, tokenizer, tmp_path / "cache").encoded("train"))
    after = list(sft(write, tokenizer, tmp_path / "cache", **change).encoded("train"))
    assert before == again
    assert after == list(sft(write, tokenizer, None, **change).encoded("train"))
    assert after != before


@pytest.mark.usefixtures("always_cached")
def test_weights_of_messages_are_refused_only_where_they_carry_loss(
    write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """OpenAI's format for training on the last message. The results of parsing the same rows are not shared."""
    user, assistant = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    path = write({"messages": [user, {**assistant, "weight": 0}, user, {**assistant, "weight": 1}]})
    keys = {"train": path, "val_fraction": 0.0}
    assert len(sft(write, tokenizer, tmp_path / "cache", **keys).encoded("train")) == 1
    for loss_on in ("assistant", "all"):
        with pytest.raises(DataError, match="has the weight 0, but weights are not supported"):
            sft(write, tokenizer, tmp_path / "cache", loss_on=loss_on, **keys).encoded("train")


@pytest.mark.usefixtures("always_cached")
def test_another_tokenizer_is_encoded_again(write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    before = list(sft(write, tokenizer, tmp_path / "cache").encoded("train"))
    other = deepcopy(tokenizer)
    other.add_tokens(["Q1"])
    assert list(sft(write, other, tmp_path / "cache").encoded("train")) != before


@pytest.mark.usefixtures("always_cached")
def test_a_tokenizer_that_reads_special_tokens_as_text_is_another_one(
    write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """``split_special_tokens``, which ``tokenizer_config.json`` may contain, is not part of ``tokenizer.json``."""
    other = deepcopy(tokenizer)
    other.split_special_tokens = True
    train = write(*({"prompt": f"Q{i}<eos>", "completion": "A"} for i in range(8)))
    one, two = (sft(write, each, tmp_path / "cache", train=train).encoded("train") for each in (tokenizer, other))
    assert list(one) != list(two)
    assert list(two) == list(sft(write, other, None, train=train).encoded("train"))


@pytest.mark.parametrize("name", ["lightning_data", "torch_utils", "some_data"])
def test_the_functions_of_a_module_are_part_of_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A method may call them. The names of the first two begin like those of libraries."""
    path = tmp_path / f"{name}.py"
    path.write_text("def clean(text):\n    return text\n\n\nclass Data:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    kind = import_module(name).Data
    before = source_of_class(kind)
    assert before == source_of_class(kind) != source_of_class(type("Data", (), {"__module__": __name__}))
    path.write_text(path.read_text().replace("return text", "return text.strip()"))
    assert source_of_class(kind) != before
    monkeypatch.delitem(sys.modules, name)
    assert source_of_class(kind) is None


@pytest.mark.usefixtures("always_cached")
@pytest.mark.parametrize(("template", "files"), [("{{ strftime_now('%d') }}", 2), ("", 1)])
def test_a_template_that_writes_the_date_is_encoded_again(
    write: Write,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    files: int,
) -> None:
    """Three runs on two days."""
    dated = deepcopy(tokenizer)
    dated.chat_template = f"{template}{tokenizer.chat_template}"
    for day in (1, 1, 2):
        monkeypatch.setattr("rlhf.data.encode_split.date", Mock(today=lambda day=day: date(2026, 12, day)))
        sft(write, dated, tmp_path / "cache", template=None).encoded("train")
    assert len(list((tmp_path / "cache").glob("rows-*.arrow"))) == files


@pytest.mark.usefixtures("always_cached")
def test_what_the_log_reports_is_stored(
    write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Invalid rows, empty responses, special tokens and truncated rows are reported at every start."""
    rows = [
        {"prompt": "Q<eos>", "chosen": "A" * 30, "rejected": ""},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {},
    ]
    path, logs = write(*rows), []
    for _ in range(2):
        data = PreferenceDataModule(
            train=path,
            val_fraction=0.0,
            max_length=20,
            on_error="skip",
            tokenizer=tokenizer,
            cache_dir=str(tmp_path / "cache"),
        )
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="rlhf"):
            data.encoded("train")
        logs.append([record.message for record in caplog.records if "Encoded rows:" not in record.message])
    assert logs[0] == logs[1]
    for part in (
        "skipped 1 invalid rows",
        "1 of 2 records have an empty",
        "contain a special token",
        "1 responses trunc",
    ):
        assert any(part in message for message in logs[1]), part


@pytest.mark.usefixtures("always_cached")
@pytest.mark.parametrize("pattern", ["rows-*.arrow", "rows-*.json", "records-*.json"])
def test_damaged_files_are_written_again(
    write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture, pattern: str
) -> None:
    expected = list(sft(write, tokenizer, tmp_path / "cache", val_fraction=0.0).encoded("train"))
    (path,) = (tmp_path / "cache").glob(pattern)
    path.write_bytes(path.read_bytes()[:20])
    assert list(sft(write, tokenizer, tmp_path / "cache", val_fraction=0.0).encoded("train")) == expected
    assert f"{path} is not a valid file" in caplog.text


@pytest.mark.usefixtures("always_cached")
def test_a_failure_leaves_no_rows(
    write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(SFTDataModule, "length", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        sft(write, tokenizer, tmp_path / "cache").encoded("train")
    assert not [
        path for path in (tmp_path / "cache").iterdir() if path.name.startswith("rows") and path.suffix != ".lock"
    ]


@pytest.mark.usefixtures("always_cached")
def test_a_cache_that_cannot_be_written_is_an_error(
    write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*cannot be used.*\n.*data\.cache_dir=null"):
        sft(write, tokenizer, tmp_path / "cache").encoded("train")


@pytest.mark.usefixtures("always_cached")
@pytest.mark.parametrize("reads", ["rlhf.data.reading.RecordParser.parse", "rlhf.data.Encoder.prepared"])
def test_errors_of_the_data_are_not_errors_of_the_cache(
    write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    """The file of the data is on a disk that fails while the rows are parsed, or while they are encoded."""

    def fail(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reads, fail)
    with pytest.raises(OSError, match="Input/output error"):
        sft(write, tokenizer, tmp_path / "cache").encoded("train")


@pytest.mark.usefixtures("always_cached")
@pytest.mark.parametrize(
    "writes", ["cache.write_json", "row_files.RowWriter._flush", "row_files.replace_part", "cache.FileLock.acquire"]
)
def test_errors_of_writing_are_errors_of_the_cache(
    write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: str
) -> None:
    """Summaries, rows, their final file, and the lock."""

    def fail(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(f"rlhf.data.{writes}", fail)
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*cannot be used \(\[Errno 5\] Input/output error\)"):
        sft(write, tokenizer, tmp_path / "cache").encoded("train")


@pytest.mark.usefixtures("always_cached")
def test_a_full_disk_is_an_error_of_the_cache(write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Neither can the end of the incomplete file be written. The file is deleted."""
    resource = pytest.importorskip("resource")
    train = write(*({"prompt": f"Q{i}", "completion": "word " * 2000} for i in range(8)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"data\.cache_dir=.*cannot be used \(\[Errno 27\]"):
            sft(write, tokenizer, tmp_path / "cache", train=train, max_length=4096).encoded("train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "cache").glob("*.part"))


def encode_on_a_rank(rank: int, folder: Path) -> list[list[int]]:
    """Encode 3,000 rows, at the same time as the other rank."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    data = SFTDataModule(
        train=str(folder / "rows.jsonl"), val_fraction=0.0, tokenizer=tokenizer, cache_dir=str(folder / "cache")
    )
    return [row.input_ids for row in data.encoded("train")]


def test_ranks_share_a_cache(write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write(*({"prompt": f"Q{i}", "completion": "A"} for i in range(3000)))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    one, other = in_ranks(encode_on_a_rank, tmp_path)
    assert one == other
    assert len(one) == 3000
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1
    assert not list((tmp_path / "cache").glob("*.part"))


@dataclass
class Pair:
    """A row with a field that has no column."""

    parts: tuple[list[int], list[int]]


class WithPairs(SFTDataModule):
    def encode(self, encoder: Encoder, record: Any) -> Any:
        row = super().encode(encoder, record)
        return Pair((row.input_ids[: row.start], row.input_ids[row.start :]))

    def length(self, row: Any) -> int:
        return len(row.parts[0])


@pytest.mark.usefixtures("always_cached")
def test_rows_of_other_types_stay_objects(write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write({"prompt": "Q", "completion": "A"})
    data = WithPairs(train=path, val_fraction=0.0, tokenizer=tokenizer, cache_dir=str(tmp_path / "cache"))
    assert isinstance(data.encoded("train"), RowList)
    (row,) = SFTDataModule(train=path, val_fraction=0.0, tokenizer=tokenizer).encoded("train")
    (pair,) = data.encoded("train")
    assert [*pair.parts[0], *pair.parts[1]] == row.input_ids


@pytest.mark.usefixtures("always_cached")
@one_architecture
def test_the_content_of_unpaired_rows_covers_their_mismatched_responses(tiny_run: TinyRun) -> None:
    """They depend on the limit of their length, and those of a few validation rows on the training data."""

    def hash_of(split: str, **keys: Any) -> str:
        data, _ = batches(tiny_run, "kto", **keys)
        rows = data.encoded(split)
        assert isinstance(rows, RowTable)
        return hashlib.sha256(b"".join(bytes(memoryview(part)) for part in rows.content())).hexdigest()

    longest = max(batches(tiny_run, "kto")[0].encoded("train").lengths)
    train = hash_of("train", max_length=200)
    assert hash_of("train", max_length=200) == train
    assert hash_of("train", max_length=int(longest)) != train
    val, train_of_val = tiny_run.write("one", PAIRS[:1]), [tiny_run.write(f"first{n}", PAIRS[:n]) for n in (4, 6)]
    assert hash_of("val", val=val, train=train_of_val[0]) != hash_of("val", val=val, train=train_of_val[1])


@pytest.mark.usefixtures("always_cached")
@one_architecture
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_training_with_columns_is_the_same(
    tiny_run: TinyRun, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference log-probs, computed with the first epoch, reach the rows of the second one."""
    keys = {"trainer": {"max_epochs": 2}}
    columns = tiny_run.train(stage, data={"cache_dir": str(tmp_path / "cache")}, **keys)
    assert isinstance(columns.datamodule.encoded("train"), RowTable)
    assert columns.module.reference is None
    monkeypatch.setattr("rlhf.data.encode_split.CACHED_ROWS", 1000)
    objects = tiny_run.train(stage, **keys)
    torch.testing.assert_close(columns.weights, objects.weights, **EXACT)


def test_rows_of_json_lines_are_read_where_they_are(tmp_path: Path) -> None:
    """Blank lines, carriage returns and a missing line feed at the end do not matter."""
    from rlhf.data.json_files import JsonLines

    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n\n  \n{"a": "\xc3\xbc"}\n{"a": 3}')
    rows = JsonLines(str(path))
    assert [rows[index] for index in (2, 0, 1, -1)] == [{"a": 3}, {"a": 1}, {"a": "ü"}, {"a": 3}]
