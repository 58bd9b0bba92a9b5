"""Labels of unpaired preferences that a dataset stores as numbers with names."""

from collections.abc import Sequence
from typing import Any

from rlhf.errors import DataError

# Names that clearly mean false or true, in lower case. The second one of a line is the opposite of the first one.
OPPOSITES = (
    ("false", "true"),
    ("no", "yes"),
    ("0", "1"),
    ("bad", "good"),
    ("negative", "positive"),
    ("neg", "pos"),
    ("undesirable", "desirable"),
    ("undesired", "desired"),
    ("rejected", "chosen"),
    ("rejected", "accepted"),
    ("dislike", "like"),
    ("disliked", "liked"),
    ("incorrect", "correct"),
    ("wrong", "right"),
    ("unhelpful", "helpful"),
    ("unsafe", "safe"),
    ("thumbs_down", "thumbs_up"),
)


def check_label_names(path: str, rows: Sequence[Any], column: str) -> None:
    """Raise an error if the labels of a dataset have names that do not clearly mean false for 0 and true for 1.

    Args:
        path: The file or the ID of the Hub dataset, for the error message.
        rows: Its rows. Those of ``datasets`` have features, and a ``ClassLabel`` among them has names.
        column: The column of the labels.
    """
    names = getattr((getattr(rows, "features", None) or {}).get(column), "names", None)
    if names is None or tuple(name.strip().lower().replace(" ", "_") for name in names) in OPPOSITES:
        return
    raise DataError(
        f"{path}: the values of the field '{column}' have the names {', '.join(map(repr, names))}, of which the first "
        "one would mean undesirable and the second one desirable.",
        f"Store a copy of the data in which '{column}' is true or false.",
    )
