"""Who may send requests to a local server."""

import pytest

from rlhf.errors import ConfigError
from rlhf.web.access import Access

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_needs_no_token(host: str) -> None:
    assert Access.of(host, None).token is None
    assert Access.of(host, TOKEN).token == TOKEN


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::"])
def test_any_other_address_gets_a_random_token(host: str) -> None:
    one, two = Access.of(host, None), Access.of(host, None)
    assert one.token is not None
    assert len(one.token) >= 32
    assert one.token != two.token
    assert one.url(8088).endswith(f":8088/?token={one.token}")


def test_a_short_token_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"command\.token must have at least 16 characters, got 3\."):
        Access.of("127.0.0.1", "abc")


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ("127.0.0.1:8088", True),
        ("localhost:8088", True),
        ("[::1]:8088", True),
        ("evil.example", False),
        ("evil.example:8088", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
        (None, False),
        ("[::1", False),  # not an address
        ("127.0.0.1:port", False),
    ],
)
def test_only_names_of_this_machine_are_allowed(header: str | None, allowed: bool) -> None:
    """A name of another site that points to 127.0.0.1 is not allowed. Behind a token, any name is."""
    assert Access.of("127.0.0.1", None).allows_host(header) is allowed
    assert Access.of("0.0.0.0", None).allows_host("workstation:8088")


@pytest.mark.parametrize(
    ("origin", "fetch_site", "allowed"),
    [
        (None, None, True),  # not a browser
        ("http://127.0.0.1:8088", "same-origin", True),
        ("http://127.0.0.1:8088", None, True),
        ("http://127.0.0.1:9000", "same-site", False),
        ("http://127.0.0.1:9000", None, False),
        ("https://evil.example", "cross-site", False),
        ("null", "cross-site", False),  # a sandboxed frame
        ("null", None, False),
        (None, "cross-site", False),
        ("http://[::1", None, False),  # not a URL
    ],
)
def test_only_pages_of_the_server_may_change_something(
    origin: str | None, fetch_site: str | None, allowed: bool
) -> None:
    assert Access.of("127.0.0.1", None).allows_origin("127.0.0.1:8088", origin, fetch_site) is allowed


def test_one_right_token_is_enough() -> None:
    access = Access.of("0.0.0.0", TOKEN)
    assert access.allows_token(None, "", TOKEN)
    assert not access.allows_token(None, "", TOKEN[:-1])
    assert not access.allows_token()
    assert Access.of("127.0.0.1", None).allows_token()
