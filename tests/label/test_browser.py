"""The preference page in a real browser, driven by its keyboard."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import Preference
from rlhf.data.parser import RecordParser
from rlhf.data.reading import RecordReader

playwright = pytest.importorskip("playwright.sync_api", reason="requires playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="requires Chromium")]
KEYS = {"ArrowLeft": "left", "ArrowRight": "right", "t": "tie", "b": "both_bad", "s": "skip"}
HOSTILE = [
    "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">",
    "</div></section>&lt;b&gt; javascript:alert(1)",
    "\u202eright to left\u202c \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "x" * 20_000,
]


class Server:
    """``stage=label`` in a separate process."""

    def __init__(self, repo: Path, folder: Path, pairs: int) -> None:
        self.repo, self.folder = repo, folder
        self.output = folder / "rlhf" / "label"
        texts = [f"prompt {n}" for n in range(pairs - len(HOSTILE))] + HOSTILE
        rows = [
            {
                "prompt": t,
                "responses": {"a": {"text": f"{t} one", "reward": 0.0}, "b": {"text": f"{t} two", "reward": 1.0}},
            }
            for t in texts
        ]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.texts = {row["prompt"]: row["responses"] for row in rows}

    def start(self) -> str:
        """Start the server, and return its address."""
        keys = [f"command.pairs={self.folder / 'samples.jsonl'}", "command.port=0", "command.overlap=0"]
        command = [sys.executable, "train.py", "stage=label", f"paths.root={self.folder}", *keys]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, cwd=self.repo, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        return next(line.strip() for line in self.process.stdout if line.strip().startswith("http://"))

    def stop(self, by: int = signal.SIGTERM) -> None:
        self.process.send_signal(by)
        self.process.wait(timeout=30)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / "preferences.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def architecture() -> str:
    return "transformer"


@pytest.fixture
def server(repo: Path, tmp_path: Path) -> Iterator[Server]:
    server = Server(repo, tmp_path, 50)
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def shown(page: Any) -> dict[str, str]:
    """Return the texts of the pair on the page, once the page shows one."""
    page.wait_for_selector("#pair:not([hidden])")
    return {name: page.locator(f"#{name}").text_content() for name in ("prompt", "left", "right")}


def press(page: Any, key: str) -> None:
    """Press a key, and wait until the page shows another pair, or none."""
    before = page.locator("#pair").get_attribute("data-id")
    page.keyboard.press(key)
    page.wait_for_function("id => document.getElementById('pair').hidden || pair.id !== id", arg=before)
    page.wait_for_function("() => !busy")


def test_fifty_pairs_by_keyboard_with_a_crash(server: Server, browser: Any) -> None:
    """The server is killed after 23 choices and started again. Nothing is lost, and no pair is shown twice."""
    page = browser.new_context().new_page()
    page.goto(server.start() + "?annotator=Ada")
    expected: dict[str, str] = {}
    seen: list[str] = []
    for number in range(50):
        if number == 23:
            server.stop(signal.SIGKILL)
            assert len(server.rows) == len(expected)
            page.keyboard.press("ArrowLeft")  # Nobody receives this choice.
            page.wait_for_selector("#message.error")
            page.goto(server.start() + "?annotator=Ada")
        texts = shown(page)
        seen.append(texts["prompt"])
        key = ["ArrowLeft", "ArrowRight", "ArrowLeft", "t", "b"][number % 5]
        if KEYS[key] in texts:
            expected[texts["prompt"]] = texts[KEYS[key]]
        press(page, key)
    page.wait_for_selector("#done:not([hidden])")
    assert sorted(seen) == sorted(server.texts)
    assert {row["prompt"]: row["chosen"] for row in server.rows} == expected
    assert len(server.rows) == len(expected) == 30
    assert page.title() == "Which response is better?"  # No script of a text has run.
    pairs = RecordReader(RecordParser()).read(str(server.output / "preferences.jsonl"), "train", (Preference,))
    assert {pair.prompt.raw_text: pair.chosen for pair in pairs} == expected


def test_two_annotators_at_once(server: Server, browser: Any) -> None:
    """They never see the same pair. Reason, undo and statistics work; the statistics are closed at first."""
    address = server.start()
    ada, ben = (browser.new_context().new_page() for _ in range(2))
    ada.goto(address + "?annotator=Ada")
    ben.goto(address)
    ben.fill("#name", "Ben")
    ben.keyboard.press("Enter")
    seen = []
    for _ in range(5):
        for page in (ada, ben):
            seen.append(shown(page)["prompt"])
            press(page, "ArrowLeft")
    assert len(set(seen)) == 10
    ada.keyboard.press("r")
    ada.keyboard.type("less is more; t")
    ada.keyboard.press("Enter")
    prompt = shown(ada)["prompt"]
    press(ada, "ArrowRight")
    (row,) = (row for row in server.rows if row["prompt"] == prompt)
    assert (row["annotators"], row["reasons"]) == (["Ada"], ["less is more; t"])
    press(ada, "u")
    assert shown(ada)["prompt"] == prompt
    assert prompt not in {row["prompt"] for row in server.rows}
    assert not ada.locator("#statistics").is_visible()
    ada.locator("summary").click()
    ada.wait_for_function("() => document.querySelectorAll('#statistics dt').length === 4")
    assert "a wins over b" in ada.locator("#statistics").text_content()


def test_a_name_that_is_rejected_is_asked_for_again(server: Server, browser: Any) -> None:
    page = browser.new_context().new_page()
    address = server.start()
    page.goto(address + "?annotator=%E2%80%AEAda")
    page.wait_for_selector("#message.error")
    page.fill("#name", "Ada")
    page.keyboard.press("Enter")
    first = shown(page)
    page.goto(address)
    assert shown(page) == first, "The name has been stored."


def test_the_server_ends_with_a_message(server: Server) -> None:
    with urllib.request.urlopen(server.start(), timeout=30):
        pass
    deadline = time.monotonic() + 30
    server.process.send_signal(signal.SIGINT)
    while server.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.process.stdout is not None
    assert "preferences.jsonl" in server.process.stdout.read()
    assert server.process.returncode == 0
