"""The requests of the chat page, and the page itself."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from chat.conftest import OpenChat
from starlette.testclient import TestClient

from rlhf.chat.session import Chat
from rlhf.chat.web import STATIC, ChatPage
from rlhf.sampling import SamplingParams
from rlhf.web.access import Access

HOST = "http://127.0.0.1:8000"


@pytest.fixture(scope="session")
def architecture() -> str:
    """Both architectures are in ``test_session.py``."""
    return "transformer"


@pytest.fixture
def page(chat: Chat) -> ChatPage:
    return ChatPage(chat)


@pytest.fixture
def client(page: ChatPage) -> TestClient:
    return TestClient(page.application(Access.of("127.0.0.1", None)), base_url=HOST)


def asked(client: TestClient, prompt: str) -> list[dict[str, Any]]:
    """Return the updates of a turn."""
    response = client.post("/api/ask", json={"prompt": prompt})
    assert response.status_code == 200
    return [json.loads(line) for line in response.text.splitlines()]


def test_a_turn_is_streamed(client: TestClient, opened: OpenChat) -> None:
    """The last update has the responses and scores that the terminal shows for the same seed."""
    updates = asked(client, "Hi.")
    chat = opened()
    turn = chat.ask("Hi.")
    while chat.step():
        pass
    assert [response["tokens"] for response in updates[0]["responses"]] == [0, 0]
    assert {response["state"] for response in updates[0]["responses"]} == {"running"}
    for shown, response in zip(updates[-1]["responses"], turn.responses, strict=True):
        assert (shown["model"], shown["state"]) == (response.model, response.state)
        assert shown["tokens"] == len(response.response_ids)
        assert shown["reward"] == pytest.approx(response.reward)
    state = client.get("/api/state").json()
    assert state["turns"] == updates[-1:]
    assert state["seed"] == 2


def test_the_state_describes_models_and_settings(client: TestClient) -> None:
    state = client.get("/api/state").json()
    assert [model["name"] for model in state["models"]] == ["sft", "ppo"]
    assert all(model["active"] and model["scored"] and not model["multi_turn"] for model in state["models"])
    assert state["reward_model"].endswith("reward_model_final.pt")
    assert state["settings"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12}


def test_settings_apply_to_the_next_prompt(client: TestClient, page: ChatPage) -> None:
    changed = client.post("/api/settings", json={"temperature": 0, "seed": 9, "active": ["ppo"]}).json()
    assert (changed["settings"]["temperature"], changed["seed"]) == (0, 9)
    last = asked(client, "Hi.")[-1]
    assert (last["seed"], [response["model"] for response in last["responses"]]) == (9, ["ppo"])
    assert page.chat.turns[0].sampling.temperature == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": -1}, "temperature must be 0 or a number of at least 1e-06."),
        ({"temperature": None}, "temperature must be 0 or a number of at least 1e-06."),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1."),
        ({"max_new_tokens": 96}, "max_new_tokens must be less than 96"),
        ({"stop_tokens": ["a"]}, "There is no setting 'stop_tokens'."),
        ({"seed": -1}, "The seed must be an integer from 0 to 4294967295."),
        ({"active": []}, "At least one of the models must respond."),
        ({"active": ["dpo"]}, "At least one of the models must respond."),
        ({"active": [["sft"]]}, "At least one of the models must respond."),
    ],
)
def test_invalid_settings_change_nothing(client: TestClient, content: dict[str, Any], message: str) -> None:
    before = client.get("/api/state").json()
    response = client.post("/api/settings", json=content)
    assert response.status_code == 422
    assert message in response.json()["error"]
    assert client.get("/api/state").json() == before


@pytest.mark.parametrize("content", [{}, {"prompt": ""}, {"prompt": " \n"}, {"prompt": 3}])
def test_a_prompt_must_be_text(client: TestClient, content: dict[str, Any]) -> None:
    assert client.post("/api/ask", json=content).status_code == 400


def test_a_new_conversation_and_the_download(client: TestClient, page: ChatPage) -> None:
    asked(client, "Grüße")
    assert client.post("/api/reset", json={}).json()["conversation"] == 2
    asked(client, "Hi.")
    lines = client.get("/api/chat.jsonl").text.splitlines()
    assert [json.loads(line) for line in lines] == [turn.describe() for turn in page.chat.turns]
    assert [json.loads(line)["conversation"] for line in lines] == [1, 2]


def test_control_characters_are_escaped(client: TestClient) -> None:
    """A right-to-left override would change the order of what follows it. Halves of characters are replaced."""
    assert asked(client, "a\x1b[2J\u202eb")[-1]["prompt"] == "a\\x1b[2J\\u202eb"
    content = b'{"prompt": "a\\ud800"}'
    response = client.post("/api/ask", content=content, headers={"Content-Type": "application/json"})
    assert json.loads(response.text.splitlines()[-1])["prompt"] == "a?"


@pytest.fixture
def slow_page(opened: OpenChat) -> ChatPage:
    return ChatPage(opened(sampling=SamplingParams(max_new_tokens=40, temperature=5.0)))


def test_stopping_keeps_what_there_is(slow_page: ChatPage) -> None:
    """A request that needs idle models is refused in the meantime."""

    async def run() -> list[str]:
        updates = slow_page.updates(slow_page.chat.ask("Hi."))
        lines = [await anext(updates)]
        client = TestClient(slow_page.application(Access.of("127.0.0.1", None)), base_url=HOST)
        for path in ("/api/ask", "/api/reset", "/api/settings"):
            assert client.post(path, json={"prompt": "Hi."}).status_code == 409
        assert client.get("/api/state").json()["running"] is True
        assert client.post("/api/stop", json={}).status_code == 200
        return [*lines, *[line async for line in updates]]

    last = json.loads(asyncio.run(run())[-1])
    assert {response["state"] for response in last["responses"]} == {"stopped"}
    assert slow_page.running is None
    assert slow_page.describe()["running"] is False


def test_responses_stop_when_nobody_reads_them(slow_page: ChatPage) -> None:
    """The page has been closed."""

    async def run() -> None:
        updates = slow_page.updates(slow_page.chat.ask("Hi."))
        await anext(updates)
        await updates.aclose()  # type: ignore[attr-defined]
        await slow_page.in_worker(int)  # Wait for what was submitted before.

    asyncio.run(run())
    assert {response.state for response in slow_page.chat.turns[0].responses} == {"stopped"}
    assert slow_page.running is None


def test_requests_of_other_sites_are_refused(client: TestClient, page: ChatPage) -> None:
    foreign = {"Origin": "http://example.com"}
    assert client.post("/api/ask", json={"prompt": "Hi."}, headers=foreign).status_code == 403
    assert client.get("/api/state", headers={"Host": "example.com"}).status_code == 403
    form = {"Content-Type": "text/plain"}
    assert client.post("/api/ask", content='{"prompt": "Hi."}', headers=form).status_code == 415
    assert page.chat.turns == []


def test_another_address_requires_a_token(page: ChatPage) -> None:
    access = Access.of("0.0.0.0", None)
    client = TestClient(page.application(access), base_url="http://host:8000")
    assert client.get("/api/state").status_code == 401
    assert client.get("/api/state", headers={"Authorization": f"Bearer {access.token}"}).status_code == 200


def test_the_page_needs_no_network_and_no_inline_code(client: TestClient) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert "script-src 'self'" in response.headers["content-security-policy"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|style=", response.text)
    for path in re.findall(r'(?:src|href)="([^"]+)"', response.text):
        assert path.startswith(("/", "data:,"))
        if path.startswith("/"):
            assert client.get(path).status_code == 200
    for file in STATIC.iterdir():
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|eval\(", file.read_text())


def test_the_static_files_are_part_of_the_package(repo: Path) -> None:
    assert "chat/static/*" in (repo / "pyproject.toml").read_text()
