"""Start a local server, and run it until it is stopped."""

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from rlhf.errors import ConfigError

POLL_SECONDS = 0.1


def bind(host: str, port: int, node: str = "command") -> socket.socket:
    """Return a socket that accepts connections at an address.

    Args:
        host: Address to listen on.
        port: Port to listen on. 0: any free one.
        node: Node of the configuration with the keys ``host`` and ``port``, for error messages.

    Raises:
        ConfigError: The address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()
    except (OSError, OverflowError) as error:
        bound.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ConfigError(
                f"{node}.port={port} is in use by another process.", f"Set {node}.port=0 for any free port."
            ) from error
        raise ConfigError(
            f"{node}.host={host} {node}.port={port}: the address cannot be used ({error}).",
            f"Set {node}.host=127.0.0.1 {node}.port=0.",
        ) from error
    return bound


def serve(
    app: Starlette,
    bound: socket.socket,
    *,
    is_done: Callable[[], bool] | None = None,
    on_exit: Callable[[], None] | None = None,
) -> None:
    """Serve an application until SIGINT or SIGTERM.

    Open requests are completed first. A second signal ends them.

    Args:
        app: The application.
        bound: Socket of ``bind``.
        is_done: Returns whether the server can end by itself. None: it never does.
        on_exit: Called on a signal, so that requests that stream responses can end.
    """
    server = _Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"), on_exit)

    async def run() -> None:
        watch = asyncio.create_task(_stop_when_done(server, is_done)) if is_done else None
        await server.serve(sockets=[bound])
        if watch is not None:
            watch.cancel()

    with suppress(KeyboardInterrupt):  # before the server handles signals
        asyncio.run(run())


class _Server(uvicorn.Server):
    """A server that a signal ends, and that then returns to its caller. uvicorn would raise the signal again."""

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None] | None) -> None:
        super().__init__(config)
        self.on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.on_exit is not None:
            self.on_exit()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


async def _stop_when_done(server: uvicorn.Server, is_done: Callable[[], bool]) -> None:
    while not is_done():
        await asyncio.sleep(POLL_SECONDS)
    server.should_exit = True
