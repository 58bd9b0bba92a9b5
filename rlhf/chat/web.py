"""The chat as a page in the browser. Only ``command.browser=true`` imports this module, which needs a server."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf.chat.rendering import best_response, models_table, unscored
from rlhf.chat.session import LARGEST_SEED, Chat, Turn
from rlhf.printable import printable
from rlhf.sampling import SamplingParams
from rlhf.schema import Seed, accepts, describe
from rlhf.web.access import Access
from rlhf.web.application import RequestError, application, json_body
from rlhf.web.server import bind, serve

STATIC = Path(__file__).parent / "static"
UPDATE_SECONDS = 0.05  # between two updates of the page
# Sampling settings that the page shows, with their ranges.
SETTINGS: dict[str, Any] = {field.name: field.type for field in fields(SamplingParams) if field.name != "stop_tokens"}


def run_browser(chat: Chat, *, host: str, port: int, token: str | None) -> int:
    """Serve the page of a chat until Ctrl-C, and return the exit code.

    Args:
        chat: The chat.
        host: Address to listen on.
        port: Port; 0 for any free one.
        token: Secret that every request must carry; None for one that is generated where the address requires it.
    """
    access = Access.of(host, token)
    console = Console(highlight=False, soft_wrap=True)
    with bind(host, port) as bound:
        console.print(models_table(chat))
        console.print(Text(f"Open {access.url(bound.getsockname()[1])}   Ctrl-C ends the chat."))
        page = ChatPage(chat)
        serve(page.application(access), bound, on_exit=page.stop_requested.set)
    return 0


class ChatPage:
    """The requests of the page. The conversation is on the server, so that reloading the page keeps it.

    Prompts are processed one at a time, in a single worker thread.

    Args:
        chat: The chat.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.worker = ThreadPoolExecutor(max_workers=1)
        self.running: Turn | None = None
        self.is_starting = False  # whether a turn is about to run
        self.stop_requested = threading.Event()

    def application(self, access: Access) -> Starlette:
        """Return the application with the page and its requests.

        Args:
            access: Who may send requests.
        """
        routes = [
            Route("/api/state", self.state),
            Route("/api/chat.jsonl", self.download),
            Route("/api/ask", self.ask, methods=["POST"]),
            Route("/api/stop", self.stop, methods=["POST"]),
            Route("/api/reset", self.reset, methods=["POST"]),
            Route("/api/settings", self.settings, methods=["POST"]),
        ]
        return application(access, routes, STATIC)

    async def state(self, request: Request) -> Response:
        """Everything that the page shows."""
        return JSONResponse(self.describe())

    async def download(self, request: Request) -> Response:
        """All prompts and responses as JSON lines, as ``/save`` writes them."""
        lines = (json.dumps(turn.describe(), ensure_ascii=False) + "\n" for turn in self.chat.turns)
        attachment = {"Content-Disposition": 'attachment; filename="chat.jsonl"'}
        return Response("".join(lines), media_type="application/jsonl", headers=attachment)

    async def ask(self, request: Request) -> Response:
        """Begin a turn, and stream it as JSON lines until all responses are complete."""
        prompt = (await json_body(request)).get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise RequestError(400, "The prompt must be text.")
        self.check_idle()
        self.is_starting = True
        try:
            self.stop_requested.clear()
            turn = await self.in_worker(self.chat.ask, prompt)
        finally:
            self.is_starting = False
        return StreamingResponse(self.updates(turn), media_type="application/jsonl")

    async def updates(self, turn: Turn) -> AsyncIterator[str]:
        """Yield the turn as it is after every few steps. If nobody reads it any more, the responses stop."""
        self.running = turn
        try:
            yield json.dumps(describe_turn(turn)) + "\n"
            while turn.is_running:
                await self.in_worker(self.advance)
                yield json.dumps(describe_turn(turn)) + "\n"
        finally:
            self.running = None
            if turn.is_running:
                self.stop_requested.set()
                self.worker.submit(self.chat.stop)

    def advance(self) -> None:
        """Continue the responses for a moment."""
        end = time.monotonic() + UPDATE_SECONDS
        while not self.stop_requested.is_set():
            if not self.chat.step() or time.monotonic() > end:
                return
        self.chat.stop()

    async def stop(self, request: Request) -> Response:
        """Stop the responses that are running."""
        self.stop_requested.set()
        return JSONResponse({})

    async def reset(self, request: Request) -> Response:
        """Begin a new conversation."""
        self.check_idle()
        await self.in_worker(self.chat.reset)
        return JSONResponse(self.describe())

    async def settings(self, request: Request) -> Response:
        """Change sampling settings, the seed or which models respond."""
        changes = await json_body(request)
        self.check_idle()
        seed, active = changes.pop("seed", self.chat.seed), changes.pop("active", self.chat.active)
        for key, value in changes.items():
            if key not in SETTINGS:
                raise RequestError(422, f"There is no setting {key!r}.")
            if not accepts(SETTINGS[key], value):
                raise RequestError(422, f"{key} must be {describe(SETTINGS[key])}.")
        if not accepts(Seed, seed):
            raise RequestError(422, f"The seed must be an integer from 0 to {LARGEST_SEED}.")
        if not isinstance(active, list) or not active or not all(name in list(self.chat.models) for name in active):
            raise RequestError(422, "At least one of the models must respond.")
        self.chat.sampling = replace(self.chat.sampling, **changes)
        self.chat.seed, self.chat.active = seed, [name for name in self.chat.models if name in active]
        return JSONResponse(self.describe())

    @property
    def is_busy(self) -> bool:
        """Whether responses are being sampled, or are about to be."""
        return self.is_starting or self.running is not None

    def check_idle(self) -> None:
        """Refuse a request that has to wait until the responses are complete."""
        if self.is_busy:
            raise RequestError(409, "Responses are being sampled. Stop them first.")

    async def in_worker(self, function: Any, *arguments: Any) -> Any:
        """Call a function in the thread of all computations."""
        return await asyncio.get_running_loop().run_in_executor(self.worker, function, *arguments)

    def describe(self) -> dict[str, Any]:
        """Return models, settings and turns for the page."""
        chat = self.chat
        without_score = unscored(chat)
        models = [
            {
                "name": name,
                "path": model.path,
                "parameters": model.parameters,
                "multi_turn": model.multi_turn,
                "active": name in chat.active,
                "scored": chat.scores is not None and name not in without_score,
            }
            for name, model in chat.models.items()
        ]
        return {
            "models": models,
            "reward_model": None if chat.scores is None else chat.scores.path,
            "settings": {key: getattr(chat.sampling, key) for key in SETTINGS},
            "seed": chat.seed,
            "conversation": chat.conversation,
            "running": self.is_busy,
            "turns": [describe_turn(turn) for turn in chat.turns],
        }


def describe_turn(turn: Turn) -> dict[str, Any]:
    """Return a turn as the page shows it, with control characters escaped."""
    best = None if turn.is_running else best_response(turn.responses)
    responses = [
        {
            "model": response.model,
            "text": printable(response.text),
            "state": response.state,
            "reward": response.reward,
            "tokens": len(response.response_ids),
            "prompt_tokens": len(response.prompt_ids) if response.prompt_cut else None,
            "error": printable(response.error),
            "best": response is best,
        }
        for response in turn.responses
    ]
    return {
        "prompt": printable(turn.prompt),
        "seed": turn.seed,
        "conversation": turn.conversation,
        "responses": responses,
    }
