"""What a user sees of an error: plain text and an exit code for mistakes, a traceback for bugs."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from contract.configs import compose_config
from rlhf.errors import (
    ConfigError,
    DataError,
    Stopped,
    UserError,
    exit_code_of,
    explain,
    first_line,
    listed,
    plain_errors,
)
from rlhf.preflight import PreflightFailed


@pytest.fixture(autouse=True)
def _restore_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``plain_errors`` sets this variable for the rest of the process."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


def error_of(function: Callable[[], Any]) -> Exception:
    """Return the exception that a function raises."""
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def refuse(**settings: Any) -> None:
    """A constructor that rejects its settings."""
    raise ConfigError("stage.ppo_epochs must be at least 1, got 0.", "Set stage.ppo_epochs=1")


def fail(**settings: Any) -> None:
    """A constructor with a bug."""
    raise ValueError("a bug")


# The text of an error


def test_an_error_is_its_message_and_an_indented_hint() -> None:
    assert str(ConfigError("The key.", "The fix.")) == "The key.\n  The fix."
    assert str(DataError("The file.")) == "The file."
    assert str(Stopped("Stopped.", "Resume.", exit_code=143)) == "Stopped.\n  Resume."


@pytest.mark.parametrize("kind", [ConfigError, DataError, PreflightFailed])
def test_user_errors_are_value_errors(kind: type[UserError]) -> None:
    """Python callers can catch them without knowing this package."""
    assert issubclass(kind, ValueError)


@pytest.mark.parametrize("error", [ConfigError("m", "h"), DataError("m", "h"), Stopped("m", "h", exit_code=130)])
def test_a_user_error_explains_itself(error: Exception) -> None:
    assert explain(error) == "m\n  h"


def test_a_user_error_is_found_behind_the_one_that_hydra_raises() -> None:
    """``instantiate`` wraps what a constructor raises in its own exception."""
    error = error_of(lambda: instantiate({"_target_": f"{__name__}.refuse"}))
    assert type(error).__name__ == "InstantiationException"
    assert explain(error) == "stage.ppo_epochs must be at least 1, got 0.\n  Set stage.ppo_epochs=1"


def test_a_missing_value_names_its_key() -> None:
    """``???`` in a yaml, read directly or by ``instantiate``."""
    node = OmegaConf.create({"model": {"_target_": f"{__name__}.fail", "path": "???"}})
    for read in (lambda: node.model.path, lambda: instantiate(node.model)):
        assert explain(error_of(read)) == "model.path has no value.\n  Set model.path=<value>"


def test_an_unknown_keyword_names_the_class_and_the_keyword() -> None:
    error = error_of(lambda: instantiate({"_target_": "rlhf.sampling.SamplingParams", "temprature": 1.0}))
    message = str(explain(error))
    assert "temprature" in message
    assert message.endswith("\n  The valid keys are the keywords of the configured class; see conf/.")


def test_an_error_of_the_trainer_names_its_keys() -> None:
    """Whether Lightning raises its own type or another one while the node ``trainer`` is instantiated."""
    own = MisconfigurationException("no such precision")
    nodes = OmegaConf.create({"trainer": {"_target_": f"{__name__}.fail"}})
    wrapped = error_of(lambda: instantiate(nodes.trainer))
    for error, reason in ((own, "no such precision"), (wrapped, "a bug")):
        assert explain(error) == (
            f"The Lightning Trainer rejects its arguments: {reason}\n"
            "  The keys are trainer.*; see conf/trainer/auto.yaml."
        )


@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError("a bug"), KeyError("a bug"), OSError("disk full")])
def test_a_bug_is_not_explained(error: Exception) -> None:
    assert explain(error) is None


def test_a_bug_in_a_constructor_is_not_explained() -> None:
    assert explain(error_of(lambda: instantiate({"_target_": f"{__name__}.fail"}))) is None


# Errors in overrides, which Hydra reports

OVERRIDES = {
    "an unknown key": (
        ["stage=sft", "stage.x=1"],
        "stage.x: there is no such key.\n  python train.py stage=<stage> --cfg job   shows every key.",
    ),
    "a similar key": (
        ["stage=sft", "learning_rate=1e-4"],
        "learning_rate: there is no such key.\n  Did you mean stage.learning_rate?\n"
        "  python train.py stage=<stage> --cfg job   shows every key.",
    ),
    "a launcher that is not installed": (
        ["stage=sft", "hydra/launcher=submitit_local"],
        "In 'hydra/config': Could not find 'hydra/launcher/submitit_local'\n\n"
        "Available options in 'hydra/launcher':\n\tbasic\n"
        "  Install the plugin of Hydra: pip install hydra-submitit-launcher",
    ),
    "a key of a stage in the pipeline": (
        ["stage.clip_range=0.1"],
        "stage.clip_range: there is no such key.\n  The pipeline runs several stages. Choose one (stage=ppo), or type "
        "'pipeline.overrides.ppo=[\"stage.<key>=<value>\"]'",
    ),
    "an unknown key inside of a value": (
        ["stage=dpo", "data.columns={loser: text}"],
        "data.columns.loser: there is no such key.\n  python train.py stage=<stage> --cfg job   shows every key.",
    ),
    "an empty key": (
        ["stage=sft", "+=[]"],
        "Hydra rejects an override: its key is empty.\n  python train.py stage=<stage> --cfg job   shows every key.",
    ),
    "a group without a configuration": (
        ["stage=sft", "logger=null"],
        "A config group cannot be null.\n  To select none of its configurations, type [], as in logger=[]",
    ),
    "a new step without a plus sign": (
        ["pipeline.variants={rloo: ['stage=grpo']}"],
        "pipeline.variants.rloo: there is no such key.\n"
        "  Add a key with a plus sign: '+pipeline.variants.<step>=[\"<key>=<value>\"]'",
    ),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_the_message_for_a_rejected_override(name: str) -> None:
    overrides, expected = OVERRIDES[name]
    assert explain(error_of(lambda: compose_config(*overrides))) == expected


@pytest.mark.parametrize(
    ("overrides", "group", "stages"),
    [
        (["stage=sft", "loss=ipo"], "loss", ["dpo"]),
        (["loss=ipo"], "loss", ["dpo"]),
        (["stage=dpo", "advantage=rloo"], "advantage", ["grpo"]),
        (["stage=dpo", "reward=python"], "reward", ["ppo", "grpo"]),
        (["stage=reward", "sampler=local"], "sampler", ["sft"]),
    ],
)
def test_a_group_names_the_stages_that_have_it(overrides: list[str], group: str, stages: list[str]) -> None:
    """The second suggestion, for the pipeline, composes."""
    message = str(explain(error_of(lambda: compose_config(*overrides))))
    assert f"Could not override '{group}'." in message
    hint = message.splitlines()[-1]
    assert hint.strip().startswith(f"{group}=<name> belongs to stage=")
    assert [stage for stage in stages if f"stage={stage}" not in hint] == []
    override = re.search(r"'(pipeline\.overrides\.\w+=.*)'", hint)
    assert override is not None
    compose_config(override[1].replace("<name>", "x"))


def test_an_unknown_choice_lists_the_choices() -> None:
    """Without the search path, which says nothing to a user."""
    message = str(explain(error_of(lambda: compose_config("stage=popo"))))
    assert "Could not find 'stage/popo'" in message
    assert [name for name in ("sft", "reward", "ppo", "grpo", "dpo", "evaluate") if name not in message] == []
    assert "search path" not in message


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("sft", "'sft' is not an override: the form is <key>=<value>.", "For a stage: stage=sft"),
        ("hello", "'hello' is not an override: the form is <key>=<value>.", "For example: stage=ppo"),
        (
            "data.train=a=b.jsonl",
            "'data.train=a=b.jsonl' cannot be parsed: the value contains a character that has a meaning for Hydra, "
            "such as a space, '=', ',' or a bracket.",
            "Quote the value: 'data.train=\"a=b.jsonl\"'",
        ),
        (
            "pipeline.overrides.ppo=stage.kl_coef=0.1",
            "'pipeline.overrides.ppo=stage.kl_coef=0.1' cannot be parsed: the value contains a character that has a "
            "meaning for Hydra, such as a space, '=', ',' or a bracket.",
            "Quote the value: 'pipeline.overrides.ppo=[\"stage.kl_coef=0.1\"]'",
        ),
    ],
)
def test_an_override_that_does_not_parse_is_explained(override: str, message: str, hint: str) -> None:
    assert explain(error_of(lambda: compose_config(override))) == f"{message}\n  {hint}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.train", "a=b.jsonl"),
        ("data.template", '{prompt}: "go"'),
        ("data.template", "{prompt}: it's\\"),
        ("pipeline.overrides.ppo", 'data.template="{prompt} a"'),
    ],
)
def test_the_suggested_quotes_work(key: str, value: str) -> None:
    """They are for the shell: ``shlex`` reads the hint as a shell would."""
    stage = [] if key.startswith("pipeline.") else ["stage=sft"]
    message = str(explain(error_of(lambda: compose_config(*stage, f"{key}={value}"))))
    (override,) = shlex.split(message.split("Quote the value: ")[1])
    found = OmegaConf.select(compose_config(*stage, override), key)
    assert found == ([value] if key.startswith("pipeline.") else value)


def test_a_path_in_the_home_directory_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the shell nor Hydra replaces the tilde, and in quotes it would be the name of a directory."""
    monkeypatch.setenv("HOME", "/home/ada b")
    message = str(explain(error_of(lambda: compose_config("stage=sft", "data.train=~/rows.jsonl"))))
    (override,) = shlex.split(message.split("Write the complete path: ")[1])
    assert OmegaConf.select(compose_config("stage=sft", override), "data.train") == "/home/ada b/rows.jsonl"


# Errors of the disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained(number: int) -> None:
    message = str(explain(OSError(number, "no space", "outputs/last.ckpt")))
    assert message.startswith("outputs/last.ckpt: there is no space left on the disk.")
    assert "resume=true" in message


def test_a_file_that_is_too_large_is_explained() -> None:
    """By a file system such as FAT32, or by ``ulimit -f``."""
    error = OSError(errno.EFBIG, "File too large", "outputs/last.ckpt")
    assert str(explain(error)).startswith("outputs/last.ckpt: the file would be larger than ")
    assert exit_code_of(error) == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_a_directory_that_cannot_be_written_is_explained(number: int) -> None:
    message = str(explain(OSError(number, "Read-only file system", "outputs/x")))
    assert message == (
        "outputs/x: the file or directory cannot be used (Read-only file system).\n"
        "  Change its permissions, or choose another one, such as paths.root=<directory> for the outputs."
    )


def test_a_name_that_is_too_long_is_explained(tmp_path: Path) -> None:
    """Permissions have nothing to do with it."""
    path = tmp_path / ("x" * 256)  # File systems allow 255 bytes.
    assert str(explain(error_of(path.mkdir))).startswith(
        f"{path}: the name of the file or directory is too long.\n  Choose a shorter name, such as run=<name>, or "
    )


def test_a_directory_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    """``/proc/x`` is reported as a missing file."""
    (tmp_path / "file").touch()
    message = str(explain(error_of(lambda: (tmp_path / "absent" / "x").mkdir())))
    assert "cannot be used (No such file or directory)" in message


# Exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("message", "hint"), 2),
        (DataError("message", "hint"), 2),
        (PreflightFailed("message", "hint"), 1),
        (Stopped("message", "hint", exit_code=128 + signal.SIGTERM), 143),
    ],
)
def test_a_user_error_exits_with_its_code(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, plain_errors():
        raise error
    assert stopped.value.code == code
    assert capsys.readouterr() == ("", "message\n  hint\n")


def test_a_wrapped_user_error_exits_with_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, plain_errors():
        instantiate({"_target_": f"{__name__}.refuse"})
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("stage.ppo_epochs must be")


def test_an_error_of_hydra_exits_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, plain_errors():
        compose_config("stage=sft", "stage.x=1")
    assert stopped.value.code == 2
    assert "stage.x" in capsys.readouterr().err


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """On ranks other than 0, the message of ``Stopped`` is empty."""
    with pytest.raises(SystemExit) as stopped, plain_errors():
        raise Stopped("", exit_code=143)
    assert stopped.value.code == 143
    assert capsys.readouterr().err == ""


def test_ctrl_c_outside_of_training_exits_with_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, plain_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert "Ctrl-C" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), plain_errors():
        (tmp_path / "nothing").read_text()


def test_a_reader_that_ends_early_is_no_error(repo: Path) -> None:
    """``train.py ... | head``: no traceback, and the exit code of a shell after SIGPIPE."""
    code = (
        "from rlhf.errors import plain_errors\n"
        "with plain_errors():\n"
        "    for _ in range(100_000): print('a line', flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"a line\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_output_that_the_encoding_lacks_is_escaped(repo: Path) -> None:
    code = "from rlhf.errors import plain_errors\nwith plain_errors():\n    print('\u4f60 \u00e9')"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, encoding="latin-1", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u4f60 \u00e9\n", "")


def test_parts_of_messages_by_hand() -> None:
    assert first_line(ValueError("\n expected 3\nat line 1")) == "expected 3"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert listed("abcde") == "a, b, c, d, e"
    assert listed("abcde", 3) == "a, b, c and 2 more"
