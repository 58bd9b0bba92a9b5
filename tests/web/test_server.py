"""A server that is started on a socket, and imports that training must not make."""

import threading
import urllib.request
from pathlib import Path

import pytest

from forked import run_python
from rlhf.errors import ConfigError
from rlhf.web.access import Access
from rlhf.web.application import application
from rlhf.web.server import bind, serve


def test_a_server_ends_when_it_is_done(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("page")
    bound = bind("127.0.0.1", 0)
    done = threading.Event()
    app = application(Access.of("127.0.0.1", None), [], tmp_path)
    thread = threading.Thread(target=lambda: serve(app, bound, is_done=done.is_set))
    thread.start()
    with urllib.request.urlopen(f"http://127.0.0.1:{bound.getsockname()[1]}/", timeout=30) as response:
        assert response.read() == b"page"
    done.set()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_a_signal_ends_requests_that_stream(repo: Path) -> None:
    """Without ``on_exit``, the server would wait for the stream, which has no end."""
    code = """
import asyncio, os, signal, threading, urllib.request
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
from rlhf.web.server import bind, serve

stopped = threading.Event()

async def lines():
    while not stopped.is_set():
        yield "line\\n"
        await asyncio.sleep(0.01)
    yield "end"

def read(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as response:
        response.readline()
        os.kill(os.getpid(), signal.SIGINT)
        texts.append(response.read().decode())

texts = []
with bind("127.0.0.1", 0) as bound:
    reader = threading.Thread(target=read, args=[bound.getsockname()[1]])
    reader.start()
    serve(Starlette(routes=[Route("/", lambda request: StreamingResponse(lines()))]), bound, on_exit=stopped.set)
    reader.join()
    print(texts[0].splitlines()[-1])
"""
    done = run_python(["-c", code], repo)
    assert (done.stdout, done.stderr) == ("end\n", "")


def test_a_port_in_use_is_explained() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"command\.port={port} is in use .*\n.*command\.port=0"):
            bind("127.0.0.1", port)


def test_an_address_of_another_machine_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"command\.host=203\.0\.113\.1 command\.port=0: the address cannot be used"):
        bind("203.0.113.1", 0)


def test_training_imports_no_server(repo: Path) -> None:
    code = (
        "import sys, rlhf.run, rlhf.pipeline, rlhf.main, rlhf.collect, rlhf.evaluate;"
        "print([name for name in ('starlette', 'uvicorn', 'rlhf.web.server', 'rlhf.label.app') if name in sys.modules])"
    )
    done = run_python(["-c", code], repo)
    assert done.stdout.strip() == "[]", done.stderr
