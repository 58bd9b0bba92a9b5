"""User errors and how they are reported: the key, the value, the constraint and the fix, without a traceback."""

import errno
import io
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.overrides import quote, to_override
from rlhf.process.launch import is_launched

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """A mistake that the user can fix. It is shown as plain text, without a traceback, and ends the process.

    Args:
        message: The key, the value and the constraint.
        hint: The fix, on a separate line.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        return _with_hint(super().__str__(), self.hint)


class ConfigError(UserError):
    """A setting that is invalid, or that contradicts another one."""


class DataError(UserError):
    """Data or a file that cannot be used."""


class TrainingError(UserError):
    """Training cannot go on, although no setting is invalid: a loss is not finite, or memory has run out."""

    exit_code = 1


class Stopped(Exception):
    """A signal has ended the run. It is shown as plain text, without a traceback.

    Args:
        message: What was stopped, by which signal, and what has been saved. An empty message shows nothing.
        hint: How to continue.
        exit_code: 128 plus the number of the signal, as a shell reports it.
    """

    def __init__(self, message: str, hint: str = "", *, exit_code: int) -> None:
        super().__init__(message)
        self.hint = hint
        self.exit_code = int(exit_code)

    def __str__(self) -> str:
        return _with_hint(super().__str__(), self.hint)


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error; the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def listed(names: Iterable[str], shown: int = 5) -> str:
    """Return the first names for a message, and how many more there are."""
    every = list(names)
    return ", ".join(every[:shown]) + (f" and {len(every) - shown} more" if len(every) > shown else "")


def _with_hint(message: str, hint: str) -> str:
    return f"{message}\n  {hint}" if hint else message


@contextmanager
def plain_errors() -> Iterator[None]:
    """Report a user error as plain text and exit with its code, 2; a bug keeps its traceback.

    A run that a signal has ended exits with 128 plus the number of the signal. If several ranks of a run fail, the
    first one reports its error, and all of them exit with its code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding != "utf-8":  # It lacks characters of the data.
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them itself.
    try:
        yield
    except KeyboardInterrupt:  # During training, rlhf.checkpoint.signals turns it into Stopped.
        sys.stderr.write("The run was interrupted by Ctrl-C (SIGINT) outside of training.\n")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # The reader has ended, as in: train.py stage=runs | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end.
        sys.exit(141)  # 128 + SIGPIPE, which Windows does not have
    except Exception as error:
        if (code := _code_of_first_failure(error)) is not None:
            sys.exit(code)
        message = explain(error)
        if message is None:
            raise
        if message:
            sys.stderr.write(f"{message}\n")
        sys.exit(exit_code_of(error))


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a command that fails with an error: 2 for a mistake of the user, 1 for a bug."""
    if isinstance(error, OSError) and error.errno in (*DISK_FULL, errno.EFBIG):
        return 1
    codes = (cause.exit_code for cause in _causes(error) if isinstance(cause, UserError | Stopped))
    return next(codes, 1 if explain(error) is None else 2)


def _code_of_first_failure(error: Exception) -> int | None:
    """Return the exit code of the rank that has failed first; None if this rank has to report its error."""
    if not is_launched():
        return None
    from rlhf.distributed import announce_failure, announced_failure, leave_at_exit  # imports torch

    is_stopped = any(isinstance(cause, Stopped) for cause in _causes(error))
    if is_stopped and not explain(error):
        return announced_failure()  # Rank 0 reports what was stopped.
    own = exit_code_of(error)
    first = announce_failure(own)
    if not is_stopped:
        leave_at_exit(own if first is None else first)
    return first


def explain(error: BaseException) -> str | None:
    """Return the text to show for a user error; None for a bug."""
    from hydra.errors import HydraException, InstantiationException, OverrideParseException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    for cause in _causes(error):
        if isinstance(cause, UserError | Stopped):
            return str(cause)
        if isinstance(cause, MissingMandatoryValue):
            return f"{cause.full_key} has no value.\n  Set {cause.full_key}=<value>"
        if type(cause).__name__ == "MisconfigurationException":  # Importing Lightning's type would load torch.
            return _trainer_message(cause)
    if isinstance(error, InstantiationException):
        reason = error.__cause__
        errors_of_arguments = TypeError | ValueError | ModuleNotFoundError  # The last one: trainer.precision.
        if isinstance(reason, errors_of_arguments) and str(error).endswith("full_key: trainer"):
            return _trainer_message(reason)
        return (
            f"{reason}\n  The valid keys are the keywords of the configured class; see conf/."
            if isinstance(reason, TypeError)
            else None
        )
    if isinstance(error, OverrideParseException):
        return _override_message(error.override)
    if isinstance(error, TypeError | ValueError | AssertionError) and _is_raised_by_hydra(error):
        return _rejected_override(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        override = getattr(error, "override", None)
        return f"{f'{override}: ' if override else ''}{_hydra_message(error)}\n  {_hydra_hint(error)}"
    return _file_message(error) if isinstance(error, OSError) else None


def _is_raised_by_hydra(error: Exception) -> bool:
    """Return whether Hydra itself has failed, as with an override of a group by a list of numbers, or without a key."""
    frames = traceback.extract_tb(error.__traceback__)
    directories = (("hydra", "_internal"), ("hydra", "core"))
    return bool(frames) and Path(frames[-1].filename).parent.parts[-2:] in directories


def _rejected_override(error: Exception) -> str:
    """Return the message for an override that Hydra rejects with a Python error."""
    if "Got NoneType" in str(error):
        return "A config group cannot be null.\n  To select none of its configurations, type [], as in logger=[]"
    problem = "its key is empty" if isinstance(error, AssertionError) else str(error).split(" : ")[0]
    return f"Hydra rejects an override: {problem}.\n  {_hydra_hint(error)}"


def _override_message(override: str) -> str:
    """Return the message for an argument that Hydra cannot parse."""
    from rlhf.stages import stages

    key, equals, value = override.partition("=")
    name = override.removeprefix("stage ").strip()
    if not equals:
        return f"{override!r} is not an override: the form is <key>=<value>.\n  " + (
            f"For a stage: stage={name}" if name in stages() else "For example: stage=ppo"
        )
    if value.startswith("~/"):
        return (
            f"{override!r} cannot be parsed: neither the shell nor Hydra replaces '~' after '='.\n"
            f"  Write the complete path: {shlex.quote(to_override(key, os.path.expanduser(value)))}"
        )
    quoted = quote(value, '"')
    suggested = f"{key}=[{quoted}]" if key.startswith("pipeline.overrides.") else f"{key}={quoted}"
    return (
        f"{override!r} cannot be parsed: the value contains a character that has a meaning for Hydra, such as a space, "
        f"'=', ',' or a bracket.\n  Quote the value: {shlex.quote(suggested)}"
    )


def _file_message(error: OSError) -> str | None:
    """Return the message for a disk that is full or a directory that cannot be written to; None for a bug."""
    if error.errno in DISK_FULL:
        return (
            f"{error.filename or 'The output directory'}: there is no space left on the disk. Earlier results and "
            "checkpoints are intact.\n  Free some space, and repeat the command with resume=true."
        )
    if error.errno == errno.EFBIG:
        return (
            f"{error.filename or 'An output file'}: the file would be larger than the file system or a limit of the "
            "process (ulimit -f) allows. Earlier results and checkpoints are intact.\n  Raise the limit, or choose "
            "another file system with paths.root=<directory>, and repeat the command with resume=true."
        )
    if error.errno == errno.ENAMETOOLONG:
        return (
            f"{error.filename}: the name of the file or directory is too long.\n  Choose a shorter name, such as "
            "run=<name>, or another place for the outputs: paths.root=<directory>"
        )
    makes_directory = any(frame.name == "mkdir" for frame in traceback.extract_tb(error.__traceback__))
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR) or makes_directory:
        return (
            f"{error.filename}: the file or directory cannot be used ({error.strerror}).\n  Change its permissions, or "
            "choose another one, such as paths.root=<directory> for the outputs."
        )
    return None


def _trainer_message(reason: BaseException) -> str:
    return (
        f"The Lightning Trainer rejects its arguments: {reason}\n  The keys are trainer.*; see conf/trainer/auto.yaml."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _hydra_message(error: BaseException) -> str:
    """Return Hydra's message without its advice to force a key in and without its search path."""
    key = _unknown_key(error)
    return f"{key}: there is no such key." if key else _hydra_text(error)


def _hydra_text(error: BaseException) -> str:
    lines = str(error).split("Config search path")[0].strip().splitlines()
    return "\n".join(line for line in lines if not line.startswith("To append to your "))


def _unknown_key(error: BaseException) -> str:
    """Return the key that does not exist; an empty string for another error."""
    overridden = re.fullmatch(r"Could not override '([^']+)'\.", _hydra_text(error))
    if overridden is None:
        return ""
    # The unknown key may be inside of the value, as in data.columns={loser: text}.
    unknown = next((str(key) for cause in _causes(error) if (key := getattr(cause, "full_key", None))), "")
    return unknown if unknown.startswith(overridden[1]) else overridden[1]


def _hydra_hint(error: BaseException) -> str:
    """Return the fix for an error of Hydra: which stages have a group, or how to configure a step of the pipeline."""
    from rlhf.stages import stages_with_group
    from rlhf.suggestions import suggestion

    if plugin := re.search(r"Could not find 'hydra/(launcher|sweeper)/([a-z]+)", str(error)):
        return f"Install the plugin of Hydra: pip install hydra-{plugin[2]}-{plugin[1]}"
    group = re.search(r"Could not override '(\w+)'", str(error))
    if group and (names := stages_with_group(group[1])):
        stage = names[0]
        return (
            f"{group[1]}=<name> belongs to {' and '.join(f'stage={name}' for name in names)}. In the pipeline, type "
            f"'pipeline.overrides.{stage}=[\"{group[1]}=<name>\"]'"
        )
    if any("Key 'stage' is not in struct" in str(cause) for cause in _causes(error)):
        return (
            "The pipeline runs several stages. Choose one (stage=ppo), or type "
            "'pipeline.overrides.ppo=[\"stage.<key>=<value>\"]'"
        )
    if added := re.search(r"Could not override 'pipeline\.(variants|overrides)", str(error)):
        return f"Add a key with a plus sign: '+pipeline.{added[1]}.<step>=[\"<key>=<value>\"]'"
    meant = suggestion(_unknown_key(error), sys.argv[1:])
    return "\n  ".join(filter(None, [meant, "python train.py stage=<stage> --cfg job   shows every key."]))
