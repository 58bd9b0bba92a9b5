"""What the log reports about the records and the encoded rows of a split."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from rlhf.data.files import location
from rlhf.errors import DataError

log = logging.getLogger(__name__)


def report_records(path: str, count: int, summary: Mapping[str, Any]) -> None:
    """Log how many rows are valid, and what may be wrong with them.

    Args:
        path: The file or the ID of the Hub dataset.
        count: Number of its rows.
        summary: What ``RecordReader`` found when it parsed them.
    """
    skipped = len(summary["invalid"])
    if skipped:
        log.warning("%s: skipped %d invalid rows; the first one: %s", path, skipped, summary["error"])
    if summary["empty"]:
        log.warning(
            "%s: %d of %d records have an empty chosen or rejected response; the first one: %s",
            path,
            summary["empty"],
            count - skipped,
            location(path, summary["first_empty"]),
        )
    if summary["system"] is not None:
        column, text = summary["system"]
        ignore = "To ignore it: data.columns.system="
        log.info(
            "%s: the field '%s' is the system prompt of its row, such as %s. %s", path, column, f"{text!r:.60}", ignore
        )
    log.info("%s: read %d records, skipped %d invalid rows", path, count - skipped, skipped)


def report_held_out(path: str, count: int, held_out: int, fraction: float) -> None:
    """Log how many records are held out for validation, and warn if there are none.

    Args:
        path: The training data.
        count: Number of all their records.
        held_out: Number of records that are held out.
        fraction: The value of ``data.val_fraction``.
    """
    log.info("%s: held out %d records for validation", path, held_out)
    if not held_out:
        enough = f" or data.val_fraction={math.ceil(100 / count) / 100:g}" if count > 1 else ""
        log.warning(
            "%s: no row is left for validation (%g %% of %d rows), so there are no validation metrics. Set "
            "data.val=<file>%s.",
            path,
            100 * fraction,
            count,
            enough,
        )


def report_encoded(data: Any, split: str, summary: Mapping[str, Any]) -> None:
    """Log how many rows of a split are used and truncated, and warn about what is probably a mistake.

    Args:
        data: A ``RecordDataModule`` that has encoded the split.
        split: ``train``, ``val`` or ``test``.
        summary: What ``encode_split`` counted.

    Raises:
        DataError: No record can be used.
    """
    rows, path, truncated = len(data.encoded(split)), data.paths[split] or split, summary["truncated_responses"]
    log.info(
        "%s: %d rows, %d dropped; %d prompts and %d responses truncated to fit %d tokens",
        path,
        rows,
        summary["dropped"],
        summary["truncated_prompts"],
        truncated,
        data.max_length,
    )
    if not rows:
        raise DataError(
            f"{path}: no record can be used with data.max_length={data.max_length}.",
            f"Set data.max_length={2 * data.max_length}.",
        )
    if truncated > summary["responses"] / 2:
        responses = summary["responses"]
        log.warning("%s: %d of %d responses are truncated. Raise data.max_length.", path, truncated, responses)
    if split == "train":
        _report_training(data, path, rows, summary)
    if summary["first_special_token"] is not None:
        token, row = summary["first_special_token"]
        source = data.paths[split] or data.paths["train"] or split
        log.warning(
            "%s: the texts of %d records contain a special token, such as %s in %s. The model reads it as a token, not "
            "as text.",
            source,
            summary["with_special_tokens"],
            token,
            source if row < 0 else location(source, row),
        )


def _report_training(data: Any, path: str, rows: int, summary: Mapping[str, Any]) -> None:
    """Log what concerns the rows that are trained on only."""
    if summary["unlearned_messages"]:
        log.info(
            "%s: %d earlier assistant messages carry no loss, because data.loss_on=response covers only the last one "
            "of each row. data.loss_on=assistant covers all of them.",
            path,
            summary["unlearned_messages"],
        )
    if summary["missing_openings"]:
        log.warning(
            "%s: The chat template opens a response with %s when it is sampled, but not in %d of %d responses of the "
            "data. Start the responses with that text, or set data.template.",
            path,
            summary["opening"],
            summary["missing_openings"],
            summary["responses"],
        )
    if summary["changed_responses"]:
        log.warning(
            "%s: The chat template changes the text of %d of %d responses, for example by removing reasoning. The "
            "model learns what the template writes. Set data.template, or change the responses.",
            path,
            summary["changed_responses"],
            summary["responses"],
        )
    if data.batch_size > rows:
        text = "data.batch_size=%d exceeds the %d rows of %s. Each batch has %d rows."
        log.warning(text, data.batch_size, rows, path, rows)
