"""The commands of a chat, such as ``/temperature 0.7``."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rlhf.chat.rendering import models_table
from rlhf.chat.session import LARGEST_SEED, Chat
from rlhf.errors import ConfigError
from rlhf.files import atomic_write
from rlhf.printable import printable


class Quit(Exception):
    """The user ends the chat."""


@dataclass(frozen=True)
class Command:
    """A command of the chat.

    Args:
        usage: How it is typed.
        help: What it does.
        run: Gets what is typed after the name, and returns what to show.
    """

    usage: str
    help: str
    run: Callable[[str], RenderableType | None]


class Commands:
    """The commands of a chat.

    Args:
        chat: The chat that they change.
        respond: Samples responses to a prompt and shows them.
    """

    def __init__(self, chat: Chat, respond: Callable[[str], object]) -> None:
        self.chat, self.respond = chat, respond
        self.saved: set[Path] = set()  # files that this chat has written and may replace
        self.commands = {command.usage.split()[0]: command for command in self._all()}

    def _all(self) -> list[Command]:
        return [
            Command("/help", "List the commands.", lambda _: self._help()),
            Command("/models [names]", "List the models, or choose those that respond: /models sft ppo", self._models),
            Command("/reset", "Begin a new conversation.", lambda _: self._reset()),
            Command("/retry", "Sample again for the last prompt, with the next seed.", lambda _: self._retry()),
            Command("/prompt", "Show the last prompt as each model gets it.", lambda _: self._prompt()),
            self._setting("temperature 0.7", "Divisor of the logits; 0: the most likely token.", float),
            self._setting("top_p 1.0", "Total probability of the tokens to sample from.", float),
            self._setting("top_k 0", "Number of most likely tokens to sample from; 0: all.", int),
            self._setting("max_new_tokens 64", "Maximum length of a response, in tokens.", int),
            Command("/seed 1", "Seed of the next prompt. It grows by 1 with each prompt.", self._seed),
            Command("/save chat.jsonl", "Write all prompts and responses to a file.", self._save),
            Command("/quit", "End the chat.", self._quit),
        ]

    def run(self, line: str) -> RenderableType | None:
        """Run one command and return what to show.

        Raises:
            ConfigError: There is no such command, or its value is invalid.
            Quit: The user ends the chat.
        """
        name, _, argument = line.strip().partition(" ")
        if name == "/exit":
            name = "/quit"
        if name not in self.commands:
            raise ConfigError(
                f"There is no command {name}. /help lists the commands.", "To start a prompt with /, type //."
            )
        return self.commands[name].run(argument.strip())

    def _help(self) -> RenderableType:
        table = Table.grid(padding=(0, 3, 0, 0), pad_edge=False)
        for command in self.commands.values():
            table.add_row(Text(command.usage, style="cyan", no_wrap=True), Text(command.help))
        table.add_row(Text("\\", style="cyan"), Text("At the end of a line: the prompt continues on the next line."))
        table.add_row(Text("Ctrl-C", style="cyan"), Text("Stop the responses. A second time, or Ctrl-D: end the chat."))
        return table

    def _models(self, argument: str) -> RenderableType:
        names = argument.replace(",", " ").split()
        if unknown := [name for name in names if name not in self.chat.models]:
            raise ConfigError(
                f"There is no model {unknown[0]}. The models are {', '.join(self.chat.models)}.",
                "To open another model, restart with command.models=[<name>,<path>]",
            )
        if names:
            self.chat.active = [name for name in self.chat.models if name in names]
        return models_table(self.chat)

    def _reset(self) -> RenderableType:
        self.chat.reset()
        return Text("A new conversation begins.", style="dim")

    def _retry(self) -> None:
        if not self.chat.turns:
            raise ConfigError("There is no prompt yet.")
        last = self.chat.turns[-1]
        if last.conversation == self.chat.conversation:
            self.chat.leave_out(last)
        self.respond(last.prompt)

    def _prompt(self) -> RenderableType:
        if not self.chat.turns:
            raise ConfigError("There is no prompt yet.")
        names: dict[str, list[str]] = {}
        for response in self.chat.turns[-1].responses:
            tokenizer: Any = self.chat.models[response.model].tokenizer
            text = str(tokenizer.decode(response.prompt_ids, skip_special_tokens=False))
            names.setdefault(text, []).append(response.model)
        table = Table.grid(padding=(0, 3, 0, 0), pad_edge=False)
        for text, models in names.items():
            title = printable(", ".join(models))
            table.add_row(Text(title, style="bold cyan"), Text(printable(text), overflow="fold"))
        return table

    def _setting(self, usage: str, help: str, kind: Callable[[str], Any]) -> Command:
        """Return a command that changes one sampling setting, or shows it if no value is typed."""
        name = usage.split()[0]

        def run(argument: str) -> RenderableType:
            if argument:
                value = _number(f"/{name}", argument, kind)
                self.chat.sampling = replace(self.chat.sampling, **{name: value})
            return Text(f"{name}: {getattr(self.chat.sampling, name)}", style="dim")

        return Command(f"/{usage}", help, run)

    def _seed(self, argument: str) -> RenderableType:
        if argument:
            seed = _number("/seed", argument, int)
            if not 0 <= seed <= LARGEST_SEED:
                raise ConfigError(f"seed must be from 0 to {LARGEST_SEED}, got {seed}.", "/seed 1")
            self.chat.seed = seed
        return Text(f"seed of the next prompt: {self.chat.seed}", style="dim")

    def _save(self, argument: str) -> RenderableType:
        if not argument:
            raise ConfigError("/save needs the name of a file.", "/save chat.jsonl")
        path = Path(argument).expanduser()
        if path.exists() and path not in self.saved:
            raise ConfigError(f"{path} exists. It is not replaced.", "Choose another name.")
        lines = "".join(json.dumps(turn.describe(), ensure_ascii=False) + "\n" for turn in self.chat.turns)
        try:
            atomic_write(path, lambda file: file.write(lines.encode("utf-8", "backslashreplace")))
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}).", "Choose another name.") from error
        self.saved.add(path)
        count = len(self.chat.turns)
        return Text(f"saved {count} prompt{'' if count == 1 else 's'} to {printable(str(path))}", style="dim")

    def _quit(self, argument: str) -> None:
        raise Quit


def _number(command: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        expected = "an integer" if kind is int else "a number"
        raise ConfigError(f"{command} needs {expected}, got {text!r}.") from None
