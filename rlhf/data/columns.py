"""Check which columns ``data.columns`` maps the fields of records to."""

from collections.abc import Mapping

from rlhf.data.records import FIELDS
from rlhf.errors import ConfigError

# Fields of one line may have the same column: no stage reads two of them as different parts of a record.
SAME_CONTENT = (
    ("prompt", "document", "messages"),
    ("target", "completion", "response", "chosen"),
    ("rejected",),
    ("margin", "reward", "label"),
)


def check_columns(columns: Mapping[str, str | None]) -> None:
    """Raise an error if a key is not a field, or if two fields of different content have the same column.

    Raises:
        ConfigError: See above.
    """
    if unknown := [name for name in columns if name not in FIELDS]:
        name, column = unknown[0], columns[unknown[0]]
        swapped = isinstance(column, str) and column in FIELDS
        raise ConfigError(
            f"data.columns.{name}={column}: '{name}' is not a field of a record. The key must be one of "
            f"{', '.join(FIELDS)}; the value is the name of the column in the data.",
            f"Set data.columns.{column}={name}" if swapped else f"Set data.columns.<field>={name}",
        )
    groups = {name: group for group in SAME_CONTENT for name in group}
    first: dict[str, str] = {} if columns.get("prompt") else {"prompt": "prompt"}
    for name, column in columns.items():
        if column is None:
            continue
        other = first.setdefault(column, name)
        if groups[other] is not groups[name]:
            raise ConfigError(
                f"data.columns.{name}={column}: the field '{other}' has the same column.",
                f"Set data.columns.{name}=<column> or data.columns.{other}=<column>",
            )
