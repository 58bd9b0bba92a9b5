"""Who may send requests to a local server.

A page of another site can make a browser send requests to 127.0.0.1, and can point its own name at that address (DNS
rebinding). So the ``Host`` and ``Origin`` of each request are checked, even without a token.
"""

import hmac
import secrets
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from rlhf.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Access:
    """The rules of one server.

    Args:
        host: Address that the server listens on.
        token: Secret that every request must carry; None where only this machine can connect.
    """

    host: str
    token: str | None

    @classmethod
    def of(cls, host: str, token: str | None, node: str = "command") -> "Access":
        """Return the rules for an address: any address other than that of this machine requires a token.

        Args:
            host: Address that the server listens on.
            token: Secret of at least 16 characters. None: a random one, if the address requires one.
            node: Node of the configuration with the keys ``host`` and ``token``, for error messages.

        Raises:
            ConfigError: The token is too short to be secret.
        """
        if token is not None and len(token) < 16:
            raise ConfigError(
                f"{node}.token must have at least 16 characters, got {len(token)}.",
                f"Remove {node}.token: a token is generated if {node}.host requires one.",
            )
        return cls(host, token or (None if host in LOOPBACK else secrets.token_urlsafe(24)))

    def allows_host(self, header: str | None) -> bool:
        """Return whether the ``Host`` header names this server."""
        try:
            address = urlsplit(f"//{header or ''}")
            name, _ = address.hostname, address.port
        except ValueError:  # Brackets without an IPv6 address, or a port that is not a number.
            return False
        if name is None:
            return False
        # Behind a token, the server may be reached under any name of its machine.
        return name in LOOPBACK or name == self.host or self.token is not None

    def allows_origin(self, host: str | None, origin: str | None, fetch_site: str | None) -> bool:
        """Return whether a request that changes something comes from a page of this server, or from no page.

        Args:
            host: The ``Host`` header.
            origin: The ``Origin`` header, which browsers send with such requests.
            fetch_site: The ``Sec-Fetch-Site`` header of browsers.
        """
        if fetch_site not in (None, "same-origin", "none"):
            return False
        try:
            return origin is None or urlsplit(origin).netloc == host
        except ValueError:  # not a URL
            return False

    def allows_token(self, *given: str | None) -> bool:
        """Return whether one of the tokens of a request is right."""
        if self.token is None:
            return True
        expected = self.token.encode()
        return any(value is not None and hmac.compare_digest(value.encode(), expected) for value in given)

    def url(self, port: int) -> str:
        """Return the address to open, with the token."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{port}/" + (f"?token={quote(self.token, safe='')}" if self.token else "")
