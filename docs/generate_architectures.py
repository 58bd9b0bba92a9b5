"""Generate docs/architectures.md, the table of supported architectures, from tests/models/architectures.py.

    python docs/generate_architectures.py

The tests verify every row of the table.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architectures.md"


def main() -> None:
    """Write the page."""
    sys.path.insert(0, str(ROOT / "tests"))
    from models.architectures import table

    PAGE.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
