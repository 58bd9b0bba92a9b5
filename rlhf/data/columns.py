"""The columns that contain the fields of records, as ``data.columns`` maps them."""

from collections.abc import Mapping, Sequence

from rlhf.data.records import CONTEXT, FIELDS
from rlhf.errors import ConfigError

# Fields of one line may have the same column: no stage reads two of them as different parts of a record.
SAME_CONTENT = (
    ("prompt", "document", "messages"),
    ("target", "completion", "response", "chosen"),
    ("rejected",),
    ("margin", "reward", "label"),
    ("system",),
    ("history",),
)


def check_columns(columns: Mapping[str, str | None]) -> None:
    """Raise an error if a key is not a field, or if two fields of different content have the same column.

    Raises:
        ConfigError: See above.
    """
    names = (*FIELDS, *CONTEXT)
    if unknown := [name for name in columns if name not in names]:
        name, column = unknown[0], columns[unknown[0]]
        swapped = column in names
        raise ConfigError(
            f"data.columns.{name}={column}: '{name}' is not a field of a record. The key must be one of "
            f"{', '.join(names)}; the value is the name of the column in the data.",
            f"Set data.columns.{column}={name}" if swapped else f"Set data.columns.<field>={name}",
        )
    groups = {name: group for group in SAME_CONTENT for name in group}
    first: dict[str, str] = {} if columns.get("prompt") else {"prompt": "prompt"}
    for name, column in columns.items():
        if not column:  # null, or empty for a field that is ignored
            continue
        other = first.setdefault(column, name)
        if groups[other] is not groups[name]:
            raise ConfigError(
                f"data.columns.{name}={column}: the field '{other}' has the same column.",
                f"Set data.columns.{name}=<column> or data.columns.{other}=<column>",
            )


def context_columns(columns: Mapping[str, str | None]) -> dict[str, Sequence[str]]:
    """Return the columns that may contain each field of ``CONTEXT``: the one that it is mapped to, or its usual ones.

    A usual column that another field is mapped to is left out.

    Args:
        columns: Maps fields to columns, see ``RecordParser``.
    """
    used = columns.values()
    return {
        name: [column for column in usual if column not in used] if (mapped := columns.get(name)) is None else [mapped]
        for name, usual in CONTEXT.items()
    }
