"""The commands of the chat."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat.conftest import OpenChat
from rich.console import Console

from rlhf.chat.commands import Commands, Quit
from rlhf.chat.session import Chat
from rlhf.errors import ConfigError


class Typed:
    """Runs commands and returns what they show as plain text."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.commands = Commands(chat, self.respond)

    def respond(self, prompt: str) -> None:
        self.chat.ask(prompt)
        while self.chat.step():
            pass

    def __call__(self, line: str) -> str:
        console = Console(width=300, color_system=None)
        with console.capture() as capture:
            if (content := self.commands.run(line)) is not None:
                console.print(content)
        return capture.get()


@pytest.fixture(scope="session")
def architecture() -> str:
    """Both architectures are in ``test_session.py``."""
    return "transformer"


@pytest.fixture
def typed(chat: Chat) -> Typed:
    return Typed(chat)


def test_help_lists_every_command(typed: Typed) -> None:
    shown = typed("/help")
    for name in typed.commands.commands:
        assert name in shown
    assert "Ctrl-C" in shown


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/temperature 0.25", "temperature", 0.25),
        ("/top_p 0.9", "top_p", 0.9),
        ("/top_k 7", "top_k", 7),
        ("/max_new_tokens 3", "max_new_tokens", 3),
    ],
)
def test_sampling_settings(typed: Typed, line: str, name: str, value: float) -> None:
    """A command without a value shows the current one."""
    assert f"{name}: {value}" in typed(line)
    assert getattr(typed.chat.sampling, name) == value
    assert f"{name}: {value}" in typed(line.split()[0])
    typed.respond("Hi.")
    assert getattr(typed.chat.turns[-1].sampling, name) == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temperature hot", "/temperature needs a number, got 'hot'"),
        ("/temperature -1", "temperature must be 0 or a number of at least 1e-06, got -1"),
        ("/top_k 1.5", "/top_k needs an integer, got '1.5'"),
        ("/seed -1", "seed must be from 0 to 4294967295, got -1"),
        ("/max_new_tokens 1000", "max_new_tokens must be less than 96"),
        ("/models dpo", "There is no model dpo. The models are sft, ppo"),
        ("/nothing", "There is no command /nothing"),
        ("/save", "/save needs the name of a file"),
        ("/retry", "There is no prompt yet"),
        ("/prompt", "There is no prompt yet"),
    ],
)
def test_mistakes_change_nothing(typed: Typed, line: str, message: str) -> None:
    before = typed.chat.sampling, typed.chat.seed, typed.chat.active
    with pytest.raises(ConfigError) as raised:
        typed(line)
    assert message in str(raised.value)
    assert (typed.chat.sampling, typed.chat.seed, typed.chat.active) == before


def test_the_seed_repeats_a_response(typed: Typed) -> None:
    typed("/temperature 5")
    for line in ("/seed 7", "/seed 8", "/seed 7"):
        typed(line)
        typed.respond("Hi.")
    ids = [turn.responses[0].response_ids for turn in typed.chat.turns]
    assert ids[0] == ids[2] != ids[1]
    assert "8" in typed("/seed"), "the seed grows by 1"


def test_retry_samples_again_with_the_next_seed(typed: Typed) -> None:
    typed.respond("Hi.")
    typed("/retry")
    assert [(turn.prompt, turn.seed) for turn in typed.chat.turns] == [("Hi.", 1), ("Hi.", 2)]


def test_models_are_listed_and_chosen(typed: Typed) -> None:
    shown = typed("/models")
    for words in ("sft", "ppo_final.pt", "single prompts", "reward_model_final.pt"):
        assert words in shown.replace("\n", "")
    assert "not used" in typed("/models ppo")
    typed.respond("Hi.")
    assert [response.model for response in typed.chat.turns[-1].responses] == ["ppo"]
    typed("/models ppo, sft")
    assert typed.chat.active == ["sft", "ppo"]


def test_prompt_shows_what_the_models_get(opened: OpenChat, typed: Typed) -> None:
    """Models with the same template are listed together."""
    typed.respond("Hi.")
    assert [line.strip() for line in typed("/prompt").splitlines()] == ["sft, ppo   <bos>Hi.", "Summary:"]
    typed.chat.models["ppo"] = opened(template="Q: {prompt}").models["ppo"]
    typed.respond("Hi.")
    lines = ["sft   <bos>Hi.", "Summary:", "ppo   <bos>Q: Hi."]
    assert [line.strip() for line in typed("/prompt").splitlines()] == lines


def test_reset_begins_a_conversation(typed: Typed) -> None:
    assert "new conversation" in typed("/reset")
    assert typed.chat.conversation == 2


def test_save_writes_every_turn(typed: Typed, tmp_path: Path) -> None:
    """In the form of samples.jsonl; an own file is replaced, a file of others is not."""
    typed.respond("Grüße")
    path = tmp_path / "chat.jsonl"
    assert "saved 1 prompt to" in typed(f"/save {path}").replace("\n", " ")
    typed("/reset")
    typed.respond("Hi.")
    typed(f"/save {path}")
    first, second = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert (first["prompt"], first["seed"], first["conversation"]) == ("Grüße", 1, 1)
    assert (second["prompt"], second["seed"], second["conversation"]) == ("Hi.", 2, 2)
    response: Any = typed.chat.turns[1].responses[0]
    assert second["responses"]["sft"]["text"] == response.text
    assert second["responses"]["sft"]["reward"] == pytest.approx(response.reward, abs=1e-4)
    assert second["sampling"]["temperature"] == 1.0
    with pytest.raises(ConfigError, match=r"exists\. It is not replaced"):
        Typed(typed.chat)(f"/save {path}")
    with pytest.raises(ConfigError, match="cannot be written"):
        typed(f"/save {path}/x")


@pytest.mark.parametrize("line", ["/quit", "/exit"])
def test_quit(typed: Typed, line: str) -> None:
    with pytest.raises(Quit):
        typed(line)


def test_without_a_reward_model_there_are_no_scores(opened: OpenChat, run_root: Path) -> None:
    (run_root / "rlhf" / "reward" / "reward_model_final.pt").unlink()
    typed = Typed(opened())
    typed.respond("Hi.")
    assert typed.chat.turns[0].responses[0].reward is None
    assert "reward" not in typed.chat.turns[0].describe()["responses"]["sft"]
    assert "reward" not in typed("/models").replace(str(run_root), "")
