"""What the log reports about the encoded rows of a split."""

import logging
from collections.abc import Mapping
from typing import Any

from rlhf.data.files import location
from rlhf.data.records import prompt_of
from rlhf.errors import DataError

log = logging.getLogger(__name__)


def report_encoded(data: Any, split: str, counts: Mapping[str, int], *, dropped: int) -> None:
    """Log how many rows of a split are used and truncated, and warn about what is probably a mistake.

    Args:
        data: A ``RecordDataModule`` that has encoded the split.
        split: ``train``, ``val`` or ``test``.
        counts: Number of ``truncated_prompts`` and ``truncated_responses``.
        dropped: Number of records that are not used.

    Raises:
        DataError: No record can be used.
    """
    rows, path, truncated = len(data.encoded(split)), data.paths[split] or split, counts["truncated_responses"]
    log.info(
        "%s: %d rows, %d dropped; %d prompts and %d responses truncated to fit %d tokens",
        path,
        rows,
        dropped,
        counts["truncated_prompts"],
        truncated,
        data.max_length,
    )
    if not rows:
        raise DataError(
            f"{path}: no record can be used with data.max_length={data.max_length}.",
            f"Set data.max_length={2 * data.max_length}.",
        )
    if truncated > rows / 2:
        log.warning("%s: %d of %d responses are truncated. Raise data.max_length.", path, truncated, rows)
    if split == "train" and data.batch_size > rows:
        log.warning("data.batch_size=%d exceeds the %d rows of %s.", data.batch_size, rows, path)
    _warn_about_special_tokens(data, split)


def _warn_about_special_tokens(data: Any, split: str) -> None:
    """Warn about texts that contain a special token: the tokenizer does not read it as text."""
    special = [str(token) for token in data.tokenizer.all_special_tokens]
    found = []
    for record in data.records(split):
        texts = data.texts_of_record(record)
        found += [(record, token) for token in special if any(token in text for text in texts)][:1]
    if found:
        path, row = data.paths[split] or data.paths["train"] or split, prompt_of(found[0][0]).row
        log.warning(
            "%s: the texts of %d records contain a special token, such as %s in %s. The model reads it as a token, not "
            "as text.",
            path,
            len(found),
            found[0][1],
            path if row is None else location(path, row),
        )
