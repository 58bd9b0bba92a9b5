"""The HTTP interface of the preference page."""

from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from rlhf.label.pairs import Pair
from rlhf.label.session import Session
from rlhf.label.summary import summarize
from rlhf.printable import printable
from rlhf.web.access import Access
from rlhf.web.application import RequestError, application, json_body

STATIC = Path(__file__).parent / "static"
SHOWN_CHOICES = ("left", "right", "tie", "both_bad", "skip")
MAX_NAME, MAX_REASON = 64, 2000  # characters


def label_application(session: Session, access: Access) -> Starlette:
    """Build the application of a session.

    ``GET /api/pair?annotator=<name>``
        The next pair of an annotator: ``{"pair": {"id", "prompt", "left", "right"}, "progress": ...}``; the pair is
        null if none is left.
    ``POST /api/choice`` with ``{"annotator", "pair", "choice", "reason"}``
        Records ``left``, ``right``, ``tie``, ``both_bad`` or ``skip``, and returns the next pair as above.
    ``POST /api/undo`` with ``{"annotator"}``
        Takes back the last choice, and returns its pair as above.
    ``GET /api/status``
        The statistics of ``rlhf.label.summary.summarize``.
    """

    def view(annotator: str, pair: Pair | None) -> JSONResponse:
        shown: dict[str, Any] | None = None
        if pair is not None:
            is_first = session.left(pair, annotator) == "first"
            left, right = (pair.first, pair.second) if is_first else (pair.second, pair.first)
            shown = {"id": pair.id, "prompt": pair.prompt_text(), "left": left.text, "right": right.text}
        return JSONResponse({"pair": shown, "progress": session.progress(annotator)})

    async def next_pair(request: Request) -> JSONResponse:
        annotator = _name(request.query_params.get("annotator"))
        return view(annotator, session.next_pair(annotator))

    async def choice(request: Request) -> JSONResponse:
        body = await json_body(request)
        annotator, made, reason = _name(body.get("annotator")), body.get("choice"), body.get("reason") or ""
        if made not in SHOWN_CHOICES:
            raise RequestError(422, f"The choice must be one of {', '.join(SHOWN_CHOICES)}.")
        if not isinstance(reason, str) or len(reason) > MAX_REASON:
            raise RequestError(422, f"The reason must be text of at most {MAX_REASON} characters.")
        session.choose(annotator, str(body.get("pair")), str(made), reason.strip())
        return view(annotator, session.next_pair(annotator))

    async def undo(request: Request) -> JSONResponse:
        annotator = _name((await json_body(request)).get("annotator"))
        return view(annotator, session.undo(annotator) or session.next_pair(annotator))

    async def status(request: Request) -> JSONResponse:
        return JSONResponse(summarize(session))

    routes = [
        Route("/api/pair", next_pair),
        Route("/api/choice", choice, methods=["POST"]),
        Route("/api/undo", undo, methods=["POST"]),
        Route("/api/status", status),
    ]
    return application(access, routes, STATIC)


def _name(value: Any) -> str:
    """Return the name of an annotator.

    Raises:
        RequestError: There is none, or it is no line of text.
    """
    name = value.strip() if isinstance(value, str) else ""
    if not name or len(name) > MAX_NAME or printable(name) != name or "\n" in name:
        raise RequestError(422, f"The annotator must have a name of at most {MAX_NAME} printable characters.")
    return name
