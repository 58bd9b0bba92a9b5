"""The chat in the terminal, and its plain form for pipes."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from rlhf.chat.commands import Commands, Quit
from rlhf.chat.rendering import Tail, models_table, render_turn
from rlhf.chat.session import Chat, Turn
from rlhf.errors import UserError
from rlhf.printable import printable

PROMPT, CONTINUED = "> ", "... "
INTERRUPTED = 128 + signal.SIGINT
REFRESHES = 12  # per second


def run_terminal(chat: Chat, stdin: TextIO | None = None, stdout: TextIO | None = None) -> int:
    """Run a chat until the user ends it, and return the exit code.

    Args:
        chat: The chat.
        stdin: Where prompts are read; None for standard input. Without a terminal, each line is a prompt or a command.
        stdout: Where responses are written; None for standard output. Without a terminal, they are plain text.
    """
    stdin, stdout = stdin or sys.stdin, stdout or sys.stdout
    if stdin.isatty() and stdout.isatty():
        return Terminal(chat, Console(file=stdout)).run()
    return Pipe(chat, stdin, stdout).run()


class Terminal:
    """A chat in a terminal.

    Args:
        chat: The chat.
        console: The terminal.
        read: Shows a prompt and reads one line. It raises ``EOFError`` for Ctrl-D and ``KeyboardInterrupt`` for Ctrl-C.
    """

    def __init__(self, chat: Chat, console: Console, read: Callable[[str], str] | None = None) -> None:
        self.chat, self.console = chat, console
        self.read = read or _read_line()
        self.commands = Commands(chat, self.respond)
        self.was_interrupted = False  # Ctrl-C was the last key, so a second one ends the chat.

    def run(self) -> int:
        """Read prompts and commands until the user ends the chat, and return the exit code."""
        self.console.print(models_table(self.chat))
        self.console.print(Text("/help lists the commands. Ctrl-C stops responses, Ctrl-D ends the chat.\n", "dim"))
        while True:
            try:
                self._handle(self._read_prompt())
            except (EOFError, Quit):
                self.console.print()
                return 0
            except KeyboardInterrupt:
                if self.was_interrupted:
                    self.console.print()
                    return INTERRUPTED
                self.was_interrupted = True
                self.console.print(Text("\nCtrl-C again or Ctrl-D ends the chat.", "dim"))

    def _read_prompt(self) -> str:
        """Read a prompt; a backslash at the end of a line continues it on the next one."""
        lines = [self.read(PROMPT)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self.read(CONTINUED))
        return "\n".join(lines)

    def _handle(self, line: str) -> None:
        self.was_interrupted = False
        try:
            if is_command(line):
                self._show(self.commands.run(line))
            elif line.strip():
                self.respond(prompt_of_line(line))
        except UserError as error:
            self.console.print(Text(printable(str(error)), "red"))

    def _show(self, content: RenderableType | None) -> None:
        if content is not None:
            self.console.print(content)

    def respond(self, prompt: str) -> None:
        """Sample the responses to a prompt, and show them while they grow."""
        turn = self.chat.ask(prompt)
        live = Live(console=self.console, auto_refresh=False, transient=True)
        with interruptible() as interrupt, live:
            last = 0.0
            while self.chat.step():
                if interrupt.is_set():
                    self.chat.stop()
                    self.was_interrupted = True
                if (now := self.console.get_time()) - last > 1 / REFRESHES:
                    last = now
                    live.update(Tail(self._render(turn), self.console.height - 1), refresh=True)
        self.console.print(self._render(turn))

    def _render(self, turn: Turn) -> RenderableType:
        return render_turn(turn, self.console.width)


class Pipe:
    """A chat without a terminal. Each line is a prompt or a command; responses are written as plain text.

    With several models, a line with the name of the model and the score precedes each response.

    Args:
        chat: The chat.
        stdin: Where lines are read.
        stdout: Where responses are written.
        stderr: Where everything else is written; None for standard error.
    """

    def __init__(self, chat: Chat, stdin: TextIO, stdout: TextIO, stderr: TextIO | None = None) -> None:
        self.chat, self.stdin, self.stdout = chat, stdin, stdout
        self.console = Console(file=stderr or sys.stderr)
        self.commands = Commands(chat, self.respond)

    def run(self) -> int:
        """Read lines until the input ends, and return the exit code: that of an error, otherwise 0."""
        try:
            for line in self.stdin:
                line = line.rstrip("\r\n")
                if is_command(line):
                    if (content := self.commands.run(line)) is not None:
                        self.console.print(content)
                elif line.strip():
                    self.respond(prompt_of_line(line))
        except Quit:
            pass
        return 0

    def respond(self, prompt: str) -> None:
        """Sample the responses to a prompt, and write them."""
        turn = self.chat.ask(prompt)
        while self.chat.step():
            pass
        for response in turn.responses:
            if response.error:
                raise UserError(f"{response.model}: {response.error}")
            if len(turn.responses) > 1:
                score = "" if response.reward is None else f" (score {response.reward:.4f})"
                self.stdout.write(f"{printable(response.model)}{score}:\n")
            self.stdout.write(f"{printable(response.text)}\n")
        if len(turn.responses) > 1:
            self.stdout.write("\n")
        self.stdout.flush()


def is_command(line: str) -> bool:
    """Return whether a line is a command: it starts with one slash."""
    return line.lstrip().startswith("/") and not line.lstrip().startswith("//")


def prompt_of_line(line: str) -> str:
    """Return the prompt of a line: two slashes at its beginning stand for one."""
    return line.replace("//", "/", 1) if line.lstrip().startswith("//") else line


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Set an event on the first Ctrl-C in this context. A second one raises ``KeyboardInterrupt``.

    Keys that are typed in the meantime are not shown.
    """
    event = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        with _without_echo():
            yield event
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _without_echo() -> Iterator[None]:
    """Switch off the echo of typed keys, where standard input is a terminal that can do so."""
    try:
        import termios

        number = sys.stdin.fileno()
        before: Any = termios.tcgetattr(number)
    except (ImportError, OSError, ValueError, termios.error):
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(number, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


def _read_line() -> Callable[[str], str]:
    """Return ``input``, with line editing and a history where the system has them."""
    with suppress(ImportError):  # Windows has no readline.
        import readline  # noqa: F401
    return input
