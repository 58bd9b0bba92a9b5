"""Names of runs: plain directory names, so that no command writes outside of its folder of outputs."""

import re
from collections.abc import Sequence

from rlhf.errors import ConfigError

_NAME = re.compile(r"\w[\w.,+=@ -]{0,199}")


def check_run_name(name: object) -> None:
    """Reject a value of ``run`` that is not the plain name of a directory.

    Raises:
        ConfigError: It is empty, or contains a path separator, a colon or a control character.
    """
    if name is None or not _NAME.fullmatch(str(name)):
        raise ConfigError(
            f"run must be a plain name of letters, digits, '_', '-' and '.', got {name!r}.",
            "Set run=<name>. For another directory of all runs: paths.root=<directory>",
        )


def check_arguments(arguments: Sequence[str]) -> None:
    """Reject ``run=../x`` in a command line before Hydra creates the directory.

    The value may be a list for a sweep, so only separators are looked for. ``check_run_name`` checks each name later.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        name = value.strip("'\"")
        if key.lstrip("+") == "run" and (not name or name.startswith(".") or re.search(r"[/\\:]", name)):
            check_run_name(name)
