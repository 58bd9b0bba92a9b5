"""The chat in a terminal and in a pipe."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat.conftest import OpenChat
from rich.console import Console

from forked import run_python
from rlhf.chat.rendering import Tail, best_response, render_turn
from rlhf.chat.session import Chat, Response, Turn
from rlhf.chat.terminal import INTERRUPTED, Pipe, Terminal, is_command, prompt_of_line
from rlhf.errors import UserError
from rlhf.printable import printable
from rlhf.sampling import SamplingParams

HOSTILE = "a\x1b[2Jb\x1b]0;title\x07c\rd\x00e\x9bf\u202eg"
SHOWN = "a\\x1b[2Jb\\x1b]0;title\\x07c\\rd\\x00e\\x9bf\\u202eg"


@pytest.fixture(scope="session")
def architecture() -> str:
    """Both architectures are in ``test_session.py``."""
    return "transformer"


class Keys:
    """Lines to type, one after the other; then Ctrl-D. An exception is raised instead of a line."""

    def __init__(self, *lines: Any) -> None:
        self.lines = list(lines)
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = self.lines.pop(0) if self.lines else EOFError
        if isinstance(line, str):
            return line
        raise line


def screen(width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, height=30, force_terminal=True, color_system=None)


def run(chat: Chat, *lines: Any, width: int = 100) -> tuple[int, str]:
    """Type lines into a terminal, and return the exit code and everything that was written."""
    console = screen(width)
    code = Terminal(chat, console, Keys(*lines)).run()
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def turn_of(*responses: Response) -> Turn:
    return Turn("Hi.", 1, SamplingParams(), 1, list(responses))


def rendered(turn: Turn, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render_turn(turn, width))
    return [line.rstrip() for line in capture.get().splitlines()]


def response(model: str, text: str, reward: float | None = None, **fields: Any) -> Response:
    return Response(model, [1], response_ids=[5, 2], text=text, state="finished", reward=reward, **fields)


def test_columns_where_the_terminal_is_wide_enough() -> None:
    """Two columns need 36 + 3 + 36 characters."""
    turn = turn_of(response("sft", "one", 1.25), response("ppo", "two", 2.0))
    assert rendered(turn, 75) == [
        f"{'sft':39}ppo",
        f"{'one':39}two",
        f"{'score 1.25, 2 tokens':39}score 2.00, 2 tokens",
        "",
    ]
    assert rendered(turn, 74) == [
        *("sft", "one", "score 1.25, 2 tokens", ""),
        *("ppo", "two", "score 2.00, 2 tokens", ""),
    ]


def test_a_single_model_has_no_title() -> None:
    turn = turn_of(Response("sft", [1, 2], response_ids=[5], text="one", state="truncated", prompt_cut=True))
    assert rendered(turn, 100) == [
        "one",
        "1 token, cut at max_new_tokens; the prompt was cut to its last 2 tokens",
        "",
    ]


def test_the_best_response_is_the_one_with_the_highest_score() -> None:
    one, two, unscored = response("a", "", 1.0), response("b", "", -2.0), response("c", "")
    assert best_response([two, one, unscored]) is one
    assert best_response([one, response("d", "", 1.001), two]) is None, "both are shown as 1.00"
    assert best_response([one, unscored]) is None


@pytest.mark.parametrize("width", [60, 120])
def test_control_characters_are_harmless(width: int) -> None:
    """In responses, names of models and errors; markup of rich is text as well."""
    turn = turn_of(response("m\x1b[31m", f"{HOSTILE} [bold]x[/bold] [/]"), response("ppo", "", error="\x1b[2J"))
    shown = "\n".join(rendered(turn, width))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert "m\\x1b[31m" in shown
    assert SHOWN in shown.replace("\n", "") or width == 120
    assert "[/bold]" in shown


def test_only_the_end_of_a_high_response_is_shown_while_it_grows() -> None:
    console = Console(width=20, color_system=None)
    with console.capture() as capture:
        console.print(Tail("\n".join(map(str, range(9))), 3))
    assert capture.get().split() == ["6", "7", "8"]


def test_a_session(chat: Chat, tmp_path: Path) -> None:
    """Prompts, a command, a mistake, an empty line, a prompt of two lines and one that starts with a slash."""
    code, shown = run(chat, "Hi.", "", "/temperature 0", "/wrong", "one\\", "two", "//etc", f"/save {tmp_path / 'x'}")
    assert code == 0
    assert [turn.prompt for turn in chat.turns] == ["Hi.", "one\ntwo", "/etc"]
    assert [turn.sampling.temperature for turn in chat.turns] == [1.0, 0.0, 0.0]
    assert "There is no command /wrong" in shown
    assert "temperature: 0.0" in shown
    assert (tmp_path / "x").is_file()
    assert all(f"score {response.reward:.2f}" in shown for response in chat.turns[0].responses)


def test_an_error_in_a_response_does_not_end_the_chat(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(prompt: str) -> Turn:
        raise UserError("The template \x1b[2J does not support this.")

    monkeypatch.setattr(chat, "ask", fail)
    code, shown = run(chat, "Hi.", "/seed")
    assert code == 0
    assert "The template \\x1b[2J does not support this." in shown
    assert "seed of the next prompt" in shown


def interrupting(chat: Chat, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Press Ctrl-C after the first step of the next response."""
    step: Callable[[], bool] = chat.step

    def interrupted() -> bool:
        monkeypatch.setattr(chat, "step", step)
        running = step()
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return running

    monkeypatch.setattr(chat, "step", interrupted)


def test_ctrl_c_stops_the_responses_and_not_the_chat(opened: OpenChat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = opened(sampling=SamplingParams(max_new_tokens=30, temperature=5.0))
    interrupting(chat, monkeypatch, times=1)
    handler = signal.getsignal(signal.SIGINT)
    code, shown = run(chat, "Hi.", "Again.")
    assert signal.getsignal(signal.SIGINT) is handler
    assert code == 0
    assert {response.state for response in chat.turns[0].responses} <= {"stopped", "finished"}
    assert "stopped" in shown
    assert len(chat.turns) == 2
    assert all(response.state in ("finished", "truncated") for response in chat.turns[1].responses)


def test_a_second_ctrl_c_ends_the_chat(opened: OpenChat, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a response is being stopped, after that at the prompt, and twice at the prompt."""
    slow = SamplingParams(max_new_tokens=30, temperature=5.0)
    for times, then in ((2, [KeyboardInterrupt]), (1, [KeyboardInterrupt])):
        chat = opened(sampling=slow)
        interrupting(chat, monkeypatch, times)
        assert run(chat, "Hi.", *then, "Not reached.")[0] == INTERRUPTED
        assert [turn.prompt for turn in chat.turns] == ["Hi."]
    assert run(opened(), KeyboardInterrupt, KeyboardInterrupt, "Not reached.")[0] == INTERRUPTED
    code, shown = run(opened(), KeyboardInterrupt, "/seed", KeyboardInterrupt)
    assert code == 0, "a command in between: both are first ones, and Ctrl-D ends the chat"
    assert shown.count("Ctrl-C again or Ctrl-D ends the chat.") == 2


def piped(chat: Chat, text: str) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    assert Pipe(chat, io.StringIO(text), out, err).run() == 0
    return out.getvalue(), err.getvalue()


def test_a_pipe_writes_plain_text(opened: OpenChat) -> None:
    """One response per line of input for one model; a line with its name and score for several."""
    chat = opened(models=["sft"])
    out, err = piped(chat, "Hi.\n\nBye.\r\n/quit\nNot reached.\n")
    assert [turn.prompt for turn in chat.turns] == ["Hi.", "Bye."]
    assert out.splitlines() == [line for turn in chat.turns for line in plain(turn.responses[0].text)]
    assert err == ""
    chat = opened()
    out, err = piped(chat, "/seed 5\nHi.")
    expected = [
        line
        for response in chat.turns[0].responses
        for line in (f"{response.model} (score {response.reward:.4f}):", *plain(response.text))
    ]
    assert out.splitlines() == [*expected, ""]
    assert "seed of the next prompt: 5" in err


def plain(text: str) -> Sequence[str]:
    return f"{printable(text)}\n".splitlines()


def test_a_mistake_in_a_pipe_is_an_error(opened: OpenChat) -> None:
    with pytest.raises(UserError, match="There is no command /wrong"):
        piped(opened(models=["sft"]), "/wrong\nHi.\n")


@pytest.mark.parametrize(
    ("line", "command", "prompt"), [("/x", True, "/x"), ("//x", False, "/x"), ("a/b", False, "a/b"), ("", False, "")]
)
def test_slashes(line: str, command: bool, prompt: str) -> None:
    assert is_command(line) is command
    assert prompt_of_line(line) == prompt


class Session:
    """``python train.py stage=chat`` in a pseudo-terminal."""

    def __init__(self, repo: Path, *overrides: str) -> None:
        self.terminal, other = pty.openpty()
        command = [sys.executable, "train.py", "stage=chat", "trainer=cpu", *overrides]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        self.process = subprocess.Popen(
            command, cwd=repo, stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
        )
        os.close(other)
        self.shown = ""

    def until(self, pattern: str, seconds: float = 90) -> str:
        """Read until a pattern is shown, and return what was read since the last call."""
        end, start = time.monotonic() + seconds, len(self.shown)
        while not re.search(pattern, self.shown[start:]):
            assert select.select([self.terminal], [], [], max(end - time.monotonic(), 0))[0], self.shown
            try:
                self.shown += os.read(self.terminal, 4096).decode("utf-8", "replace")
            except OSError:  # The program has ended.
                break
        return self.shown[start:]

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())


@pytest.mark.slow
def test_a_real_terminal(repo: Path, run_root: Path, architecture: str) -> None:
    """A prompt, a command and Ctrl-D, through Hydra and line editing."""
    session = Session(repo, f"paths.root={run_root}", "command.sampling.max_new_tokens=5")
    try:
        assert "/help lists the commands" in session.until("> ")
        session.type("Hi.\n")
        assert "score" in session.until(r"tokens?[^\n]*\n(.|\n)*> ")
        session.type("/seed\n")
        assert "seed of the next prompt: 2" in session.until(r"prompt: 2(.|\n)*> ")
        session.type("\x04")
        assert session.process.wait(timeout=60) == 0
    finally:
        session.process.kill()
        os.close(session.terminal)


@pytest.mark.slow
def test_the_chat_in_the_terminal_loads_no_server(repo: Path) -> None:
    code = "import sys, rlhf.chat; print(sorted({'starlette', 'uvicorn', 'rlhf.web'} & set(sys.modules)))"
    done = run_python(["-c", code], repo)
    assert done.stdout.strip() == "[]", done.stderr
