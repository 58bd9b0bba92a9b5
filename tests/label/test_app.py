"""The HTTP interface of the preference page."""

from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from rlhf.label.app import label_application
from rlhf.label.pairs import Pair, Response
from rlhf.label.session import Session
from rlhf.web.access import Access


def client_of(session: Session) -> TestClient:
    return TestClient(label_application(session, Access.of("127.0.0.1", None)), base_url="http://127.0.0.1")


@pytest.fixture
def client(open_session: Callable[..., Session]) -> TestClient:
    return client_of(open_session())


def test_a_pair_is_shown_blind(client: TestClient) -> None:
    """Neither models nor scores are in the response."""
    view = client.get("/api/pair", params={"annotator": "Ada"}).json()
    assert view["pair"].keys() == {"id", "prompt", "left", "right"}
    assert {view["pair"]["left"], view["pair"]["right"]} == {"text a 0", "text b 0"}
    assert view["progress"] == {"total": 6, "labeled": 0, "skipped": 0, "own": 0}


def test_a_choice_returns_the_next_pair(client: TestClient, tmp_path: Path) -> None:
    first = client.get("/api/pair", params={"annotator": "Ada"}).json()["pair"]
    body = {"annotator": "Ada", "pair": first["id"], "choice": "left", "reason": " clear "}
    view = client.post("/api/choice", json=body).json()
    assert view["pair"]["prompt"] == "prompt 1"
    assert view["progress"]["own"] == 1
    line = (tmp_path / "preferences.jsonl").read_text()
    assert f'"chosen": "{first["left"]}"' in line
    assert '"reasons": ["clear"]' in line
    assert client.post("/api/undo", json={"annotator": "Ada"}).json()["pair"] == first
    assert (tmp_path / "preferences.jsonl").read_text() == ""
    assert client.get("/api/status").json()["annotators"] == {}


def test_the_last_choice_ends_the_session(client: TestClient) -> None:
    view = client.get("/api/pair", params={"annotator": "Ada"}).json()
    for _ in range(6):
        view = client.post("/api/choice", json={"annotator": "Ada", "pair": view["pair"]["id"], "choice": "tie"}).json()
    assert view["pair"] is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/choice", {"annotator": "Ada", "pair": "?", "choice": "left"}),
        ("/api/choice", {"annotator": "Ada", "choice": "best"}),
        ("/api/choice", {"annotator": "Ada", "choice": ["left"]}),
        ("/api/choice", {"annotator": "", "choice": "left"}),
        ("/api/choice", {"annotator": "A\nb", "choice": "left"}),
        ("/api/choice", {"annotator": "a" * 65, "choice": "left"}),
        ("/api/choice", {"annotator": 5, "choice": "left"}),
        ("/api/choice", {"annotator": "Ada", "choice": "left", "reason": "x" * 2001}),
        ("/api/choice", {"annotator": "Ada", "choice": "left", "reason": 1}),
        ("/api/undo", {}),
    ],
)
def test_invalid_requests_change_nothing(
    client: TestClient, path: str, body: dict[str, object], tmp_path: Path
) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 422
    assert response.json()["error"]
    assert not (tmp_path / "journal.jsonl").exists()


def test_names_of_any_script_are_accepted(client: TestClient) -> None:
    for name in ("\u0645\u06cc\u200c\u062e", "Zo\u00eb\u00a0Q.", "\U0001f469\u200d\U0001f680"):
        assert client.get("/api/pair", params={"annotator": name}).status_code == 200


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "\u202eabc", "\U0001f600", "x" * 20_000, "a\x00b", "</pre>&amp;\u2028"]
)
def test_texts_arrive_unchanged(tmp_path: Path, text: str) -> None:
    session = Session([Pair(text, Response(text + "1"), Response(text + "2"))], tmp_path)
    client = client_of(session)
    shown = client.get("/api/pair", params={"annotator": "Ada"}).json()["pair"]
    assert (shown["prompt"], {shown["left"], shown["right"]}) == (text, {text + "1", text + "2"})
    client.post("/api/choice", json={"annotator": "Ada", "pair": shown["id"], "choice": "left"})
    assert Session(list(session.pairs.values()), tmp_path).progress("Ada")["own"] == 1
