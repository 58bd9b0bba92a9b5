"""Mistakes a user can mend, and how they are shown: where, what, why, and what to type."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# groups of the configuration that only some stages have: what they choose, and one of those stages
GROUPS = {
    "loss": ("the loss of stage=dpo", "dpo"),
    "reward": ("where the rewards of stage=ppo and stage=grpo come from", "ppo"),
    "advantage": ("the advantages of stage=grpo", "grpo"),
}


class UserError(Exception):
    """A mistake in what was typed or given: shown as plain text, without a traceback, with exit code 2.

    The message says where, what and why; ``hint`` says what to type instead.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  {self.hint}" if self.hint else message


@contextmanager
def plain_errors() -> Iterator[None]:
    """Show a user's mistake in plain words and leave with its exit code, 2; a bug keeps its traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them itself
    try:
        yield
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        sys.stderr.write(f"{message}\n")
        sys.exit(next((cause.exit_code for cause in _causes(error) if isinstance(cause, UserError)), 2))


def explain(error: BaseException) -> str | None:
    """The text to show for a user's mistake; None for anything else."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    for cause in _causes(error):
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, MissingMandatoryValue):
            return f"{cause.full_key} has no value\n  type {cause.full_key}=<value>"
        if type(cause).__name__ == "MisconfigurationException":  # Lightning's; not imported, it would load torch
            return f"the Trainer refuses this: {cause}\n  the keys are trainer.*, see conf/trainer/auto.yaml"
    if isinstance(error, InstantiationException):
        reason = error.__cause__
        if isinstance(reason, TypeError | ValueError) and str(error).endswith("full_key: trainer"):
            return f"the Trainer refuses this: {reason}\n  the keys are trainer.*, see conf/trainer/auto.yaml"
        return f"{reason}\n  the keys are those of the class: see conf/" if isinstance(reason, TypeError) else None
    if isinstance(error, HydraException | OmegaConfBaseException):
        override = getattr(error, "override", None)
        return f"{f'{override}: ' if override else ''}{_what(str(error))}\n  {_hint(error)}"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _what(message: str) -> str:
    """Hydra's message without its advice to force a key in, and without its search path."""
    lines = message.split("Config search path")[0].strip().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("To append to your "))
    return re.sub(r"^Could not override '([^']+)'\.$", r"\1: there is no such key", text)


def _hint(error: BaseException) -> str:
    for group, (what, stage) in GROUPS.items():
        if f"Could not override '{group}'" in str(error):
            return f"it chooses {what}; in the pipeline: 'pipeline.overrides.{stage}=[\"{group}=<name>\"]'"
    if any("Key 'stage' is not in struct" in str(cause) for cause in _causes(error)):
        return (
            "the pipeline runs several stages: choose one (stage=ppo), or type "
            "'pipeline.overrides.ppo=[\"stage.<key>=<value>\"]'"
        )
    return "python train.py stage=<stage> --cfg job   shows every key"
