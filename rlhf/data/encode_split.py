"""Encode the records of a split, or read them as an earlier run has encoded them."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import track
from transformers import PreTrainedTokenizerBase

from rlhf.data.cache import CACHED_ROWS, Summary, source_of_class, usable
from rlhf.data.encode import Encoder
from rlhf.data.records import Message, prompt_of
from rlhf.data.row_columns import leaves
from rlhf.data.row_files import RowWriter
from rlhf.data.rows import RowList, Rows

ENCODED_RECORDS = 256  # records that are encoded at once


def encode_split(data: Any, split: str) -> tuple[Rows, Summary]:
    """Return the encoded rows of a split, and a summary for ``report_encoded``.

    Args:
        data: A ``RecordDataModule``.
        split: ``train``, ``val`` or ``test``.
    """
    encoder, records = data.encoder(), data.records(split)
    if len(records) < CACHED_ROWS or (row_type := _row_type(data, encoder, records)) is None:
        return _encode_as_objects(data, split, records)
    key = _key(data, encoder.tokenizer, records) if data.cache is not None else None
    if key is None:
        return _encode_as_table(data, split, records, row_type, None)
    rows, summary = data.cache.rows(key, row_type, lambda path: _encode_as_table(data, split, records, row_type, path))
    return rows, summary


def _row_type(data: Any, encoder: Encoder, records: Sequence[Any]) -> type | None:
    """Return the type of the rows if Arrow has a column for each of its fields."""
    row = next((row for record in records if (row := data.encode(encoder, record)) is not None), None)
    try:
        leaves(type(row))
    except TypeError:
        return None
    return type(row)


def _encode_as_objects(data: Any, split: str, records: Sequence[Any]) -> tuple[Rows, Summary]:
    encoding = _Encoding(data, split, records)
    encoded = list(encoding)
    rows = [row for row, _ in encoded]
    return RowList(rows, [data.length(row) for row in rows], [number for _, number in encoded]), encoding.summary


def _encode_as_table(
    data: Any, split: str, records: Sequence[Any], row_type: type, path: Path | None
) -> tuple[Rows, Summary]:
    encoding, writing = _Encoding(data, split, records), partial(_writing, path)
    with writing():
        writer = RowWriter(row_type, path)
    try:
        for row, number in encoding:
            with writing():
                writer.add(row, data.length(row), number)
        with writing():
            return writer.finish(), encoding.summary
    except BaseException:
        writer.discard()
        raise


def _writing(path: Path | None) -> AbstractContextManager[None]:
    return nullcontext() if path is None else usable(path.parent)


class _Encoding:
    """Iterates over the encoded rows of records, each with its row number in the data."""

    def __init__(self, data: Any, split: str, records: Sequence[Any]) -> None:
        self._data, self._split, self._records = data, split, records
        self.summary: Summary = {}

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        data, records, encoder = self._data, self._records, self._data.encoder()
        special = special_token_pattern(data.tokenizer)
        dropped, with_special = 0, 0
        first_special: tuple[str, int] | None = None
        starts = range(0, len(records), ENCODED_RECORDS)
        quiet = len(records) < CACHED_ROWS
        progress = track(starts, f"encoding {self._split}", transient=True, disable=quiet)
        chunks = (records[start : start + ENCODED_RECORDS] for start in progress)
        for chunk in encoder.prepared(
            chunks, lambda chunk: [pair for record in chunk for pair in conversations(record)]
        ):
            for record in chunk:
                number = prompt_of(record).row
                row_number = -1 if number is None else number
                texts = data.texts_of_record(record)
                if found := next(filter(None, map(special.search, texts)), None):
                    with_special += 1
                    first_special = first_special or (found[0], row_number)
                row = data.encode(encoder, record)
                if row is None:
                    dropped += 1
                else:
                    yield row, row_number
        self.summary = {
            "dropped": dropped,
            "responses": encoder.counts["responses"],
            "truncated_prompts": encoder.counts["truncated_prompts"],
            "truncated_responses": encoder.counts["truncated_responses"],
            "missing_openings": encoder.openings.missing,
            "opening": encoder.openings.shown,
            "changed_responses": encoder.openings.changed,
            "unlearned_messages": encoder.counts["unlearned_messages"],
            "with_special_tokens": with_special,
            "first_special_token": first_special,
        }


def conversations(record: Any) -> list[tuple[Sequence[Message], str | None]]:
    """Return the messages of a record's prompt with each of its responses, as ``Encoder.prepare`` takes them."""
    prompt = prompt_of(record)
    responses = [getattr(record, name) for name in ("response", "chosen", "rejected") if hasattr(record, name)]
    return [(prompt.messages, response) for response in responses or [None]]


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that finds the texts that the tokenizer reads as special tokens.

    ``all_special_tokens`` may lack those of a chat template, such as ``<|eot_id|>`` of Llama 3.
    """
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    names = [] if tokenizer.split_special_tokens else {*map(str, tokenizer.all_special_tokens), *added} - {""}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _key(data: Any, tokenizer: PreTrainedTokenizerBase, records: Any) -> Any:
    """Return everything that the encoded rows depend on, as JSON; None if that is not possible."""
    key = {
        "records": getattr(records, "key", None),
        "code": source_of_class(type(data)),
        "settings": data.encode_settings(),
        "max_length": data.max_length,
        "tokenizer": _tokenizer_key(tokenizer),
    }
    try:
        json.dumps(key)
    except TypeError:
        return None
    return None if None in (key["records"], key["code"], key["tokenizer"]) else key


def _tokenizer_key(tokenizer: Any) -> str | None:
    if not tokenizer.is_fast:
        return None
    special = [tokenizer.bos_token, tokenizer.eos_token, *tokenizer.all_special_tokens]
    splits = tokenizer.split_special_tokens  # The serialized tokenizer lacks it.
    content = json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, special, splits])
    if "strftime_now" in str(tokenizer.chat_template):  # The template writes the date.
        content += str(date.today())
    return hashlib.sha256(content.encode()).hexdigest()
