"""Rows in the form of Alpaca."""

from rlhf.data.records import FIELDS, Row


def without_alpaca_fields(row: Row) -> Row:
    """Return a row of the form of Alpaca as a prompt with a completion; other rows as they are.

    Its fields are ``instruction``, ``output`` and possibly ``input`` (https://github.com/tatsu-lab/stanford_alpaca).
    """
    texts = [row.get(name) for name in ("instruction", "output")]
    if not all(isinstance(text, str) for text in texts) or any(row.get(name) is not None for name in FIELDS):
        return row
    prompt = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text and isinstance(text, str))
    return {**row, "prompt": prompt, "completion": row["output"]}
