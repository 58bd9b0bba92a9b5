"""A Starlette application whose requests are checked, and whose responses cannot be used by other sites."""

import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from rlhf.errors import UserError
from rlhf.web.access import Access

MAX_BODY = 1 << 16  # bytes of a request
HEADERS = {
    # Scripts and styles come from files of the server only; text of the data can never be one.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
Handler = Callable[[Request], Awaitable[Response]]


class RequestError(Exception):
    """A request that is refused, with its HTTP status code."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def application(access: Access, routes: Sequence[Route], static: Path) -> Starlette:
    """Build an application.

    Args:
        access: Who may send requests.
        routes: The routes of the interface, such as ``Route("/api/pair", handler)``.
        static: Directory of the page: ``index.html``, which ``/`` shows, and the files that it uses, under ``/static``.
    """
    files = [
        Route(f"/static/{path.name}" if path.name != "index.html" else "/", _file(path))
        for path in sorted(static.iterdir())
        if path.suffix in MEDIA_TYPES
    ]
    return Starlette(
        routes=[*files, *routes],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=_guard(access))],
        exception_handlers={RequestError: _refused, UserError: _invalid, Exception: _failed},
    )


async def json_body(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request.

    Raises:
        RequestError: The body is too large, or it is not a JSON object.
    """
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise RequestError(415, "The content type must be application/json.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise RequestError(413, f"The request must have at most {MAX_BODY} bytes.")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "The request is not JSON.") from error
    if not isinstance(content, dict):
        raise RequestError(400, "The request must be a JSON object.")
    return content


def _guard(access: Access) -> Callable[[Request, RequestResponseEndpoint], Awaitable[Response]]:
    async def dispatch(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = _check(access, request) or await call_next(request)
        response.headers.update(HEADERS)
        return response

    return dispatch


def _check(access: Access, request: Request) -> Response | None:
    """Return the response to a request that is refused, or that only brings its token; None for all others."""
    headers = request.headers
    host = headers.get("host")
    if not access.allows_host(host):
        return _error(403, "This server does not have this name.")
    given = request.query_params.get("token")
    bearer = headers.get("authorization", "").removeprefix("Bearer ")
    if not access.allows_token(given, bearer, unquote(request.cookies.get(_cookie(request), ""))):
        return _error(401, "The token is missing or wrong. Open the address that the server has printed.")
    changes = request.method not in ("GET", "HEAD")
    if changes and not access.allows_origin(host, headers.get("origin"), headers.get("sec-fetch-site")):
        return _error(403, "Requests from other sites are refused.")
    if access.token is not None and given is not None and request.url.path == "/":
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(_cookie(request), quote(access.token, safe=""), httponly=True, samesite="strict")
        return response
    return None


def _cookie(request: Request) -> str:
    """Return the name of the cookie with the token. Browsers send a cookie to all ports of a host."""
    return f"rlhf_token_{request.url.port}"


def _file(path: Path) -> Handler:
    async def serve(request: Request) -> Response:
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix])

    return serve


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error(error.status, str(error))


async def _invalid(request: Request, error: Exception) -> Response:
    return _error(422, str(error))


async def _failed(request: Request, error: Exception) -> Response:
    return _error(500, "The server has failed. Its terminal shows the error.")
