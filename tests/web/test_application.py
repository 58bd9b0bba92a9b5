"""Requests through the checks of a local server."""

from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from rlhf.errors import ConfigError
from rlhf.web.access import Access
from rlhf.web.application import MAX_BODY, application, json_body

TOKEN = "0123456789abcdef"


async def echo(request: Request) -> JSONResponse:
    return JSONResponse(await json_body(request))


async def fail(request: Request) -> JSONResponse:
    raise RuntimeError("a secret of the server")


async def refuse(request: Request) -> JSONResponse:
    raise ConfigError("There is no pair.", "Reload the page.")


def client_of(folder: Path, access: Access, host: str = "127.0.0.1") -> TestClient:
    (folder / "index.html").write_text("<p>page</p>")
    (folder / "page.js").write_text("1")
    (folder / "secret.txt").write_text("secret")
    routes = [Route("/echo", echo, methods=["POST"]), Route("/fail", fail), Route("/refuse", refuse)]
    app = application(access, routes, folder)
    return TestClient(app, base_url=f"http://{host}", raise_server_exceptions=False, follow_redirects=False)


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return client_of(tmp_path, Access.of("127.0.0.1", None))


def test_a_page_and_its_files_are_served(client: TestClient) -> None:
    """Other files of the directory, and of directories above it, are not."""
    assert client.get("/").text == "<p>page</p>"
    assert client.get("/static/page.js").headers["content-type"].startswith("text/javascript")
    for path in ("/static/secret.txt", "/static/../conftest.py", "/static/%2e%2e/conftest.py", "/index.html"):
        assert client.get(path).status_code == 404


def test_scripts_of_the_data_cannot_run(client: TestClient) -> None:
    """Neither inline scripts nor those of other servers, and the page cannot be framed."""
    headers = client.get("/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b'{"a": 1}', {"content-type": "application/json"}, 200),
        (b'{"a": 1}', {"content-type": "text/plain"}, 415),  # what a form of another site can send
        (b'{"a": 1}', {"content-type": "application/json", "origin": "http://evil.example"}, 403),
        (b'{"a": 1}', {"content-type": "application/json", "sec-fetch-site": "cross-site"}, 403),
        (b'{"a": 1}', {"content-type": "application/json", "host": "evil.example"}, 403),
        (b"[1]", {"content-type": "application/json"}, 400),
        (b"{", {"content-type": "application/json"}, 400),
        (b"[" * 20_000, {"content-type": "application/json"}, 400),
        (b'"' + b"x" * MAX_BODY + b'"', {"content-type": "application/json"}, 413),
    ],
)
def test_requests_that_change_something_are_checked(
    client: TestClient, content: bytes, headers: dict[str, str], status: int
) -> None:
    response = client.post("/echo", content=content, headers=headers)
    assert response.status_code == status
    assert response.json() == ({"a": 1} if status == 200 else {"error": response.json()["error"]})


@pytest.mark.parametrize("host", ["[::1", "127.0.0.1:port"])
def test_a_host_that_is_not_an_address_is_refused(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 403


def test_errors_reveal_nothing(client: TestClient) -> None:
    assert client.get("/fail").status_code == 500
    assert "secret" not in client.get("/fail").text
    assert client.get("/refuse").json() == {"error": "There is no pair.\n  Reload the page."}


def test_every_request_needs_the_token(tmp_path: Path) -> None:
    """The first visit brings it in the address, which is then replaced. Programs send it in a header."""
    client = client_of(tmp_path, Access.of("0.0.0.0", TOKEN), host="workstation")
    kwargs: dict[str, Any] = {"content": b"{}", "headers": {"content-type": "application/json"}}
    for response in (client.get("/"), client.get("/static/page.js"), client.post("/echo", **kwargs)):
        assert response.status_code == 401
    assert client.get("/", params={"token": TOKEN[:-1] + "x"}).status_code == 401
    assert client.get("/", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    first = client.get("/", params={"token": TOKEN})
    assert (first.status_code, first.headers["location"]) == (303, "/")
    assert "HttpOnly" in first.headers["set-cookie"]
    assert "SameSite=strict" in first.headers["set-cookie"]
    assert client.get("/").status_code == 200  # with the cookie
    other = client_of(tmp_path, Access.of("0.0.0.0", TOKEN[::-1]), host="workstation:8089")
    name = other.get("/", params={"token": TOKEN[::-1]}).headers["set-cookie"].split("=")[0]
    assert name not in client.cookies  # Browsers send a cookie to all ports of a host.
    assert client.post("/echo", **kwargs).status_code == 200


@pytest.mark.parametrize(
    "token", ["correct horse battery", "50%+#1&2?3/4;5,6=7", 'quote"back\\slash-16', "пароль-на-страницу"]
)
def test_a_token_may_contain_any_characters(tmp_path: Path, token: str) -> None:
    """The address that the server prints opens the page, and the cookie then carries the token."""
    access = Access.of("127.0.0.1", token)
    client = client_of(tmp_path, access, "127.0.0.1:8088")
    address = access.url(8088)
    assert address.isascii()
    assert " " not in address
    assert client.get(address).status_code == 303
    assert client.get("/").text == "<p>page</p>"
    client.cookies.clear()
    assert client.get("/").status_code == 401
