"""Test untrusted tokenizers and chat templates in a separate process with a time limit.

A chat template is a program, and a regular expression can take exponential time. Neither can be interrupted reliably
within a process.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from rlhf.errors import DataError, first_line

SECONDS = 20  # of processor time, of which starting the process takes less than one
_OUT_OF_TIME = {getattr(signal, name, None) for name in ("SIGKILL", "SIGXCPU")}  # Windows has neither.
WAIT = 600  # seconds: the limit on a machine that has other work to do, and on Windows
MEMORY = 8 << 30  # bytes of address space
RENDER_SECONDS = 10  # for one conversation in this process, which usually takes a fraction of a millisecond
MAX_CHARACTERS = 100_000  # that a template may write for one of the conversations below
_OTHER_TEMPLATE = 'Use another template: data.template="{prompt}\\n"'

TEXTS = (
    "The mayor of Dunmore opened the new bridge on Monday; it cost 90 euros.\n\n\tdef f(x):\n    return x ** 2\n",
    *(text * 2000 + "!" for text in ("a", " ", "\n", "1", "aA", "ab ", "é", "漢", ".", "\t ")),
)
_USER = {"role": "user", "content": "How tall is the bridge?"}
_ASSISTANT = {"role": "assistant", "content": "Thirty meters."}
CONVERSATIONS = (
    [_USER],
    [{"role": "user", "content": "Name a river."}],
    [_USER, _ASSISTANT],
    [_USER, _ASSISTANT] * 10,
    [{"role": "system", "content": "Be brief."}, _USER],
    [{"role": "user", "content": "long " * 2000}],
)


def check_tokenizer(tokenizer: Any, origin: str) -> None:
    """Reject a tokenizer that hangs or fails on ordinary text.

    Args:
        tokenizer: A tokenizer of ``transformers``. Those that are not implemented in Rust are not tried.
        origin: Where it was opened, for messages.

    Raises:
        DataError: It does not encode short texts within ``SECONDS``.
    """
    if tokenizer.is_fast and (problem := _try(tokenizer=tokenizer.backend_tokenizer.to_str())):
        raise DataError(
            f"{origin}: the tokenizer cannot be used: encoding {len(TEXTS)} short texts {problem}.",
            "Look for a regular expression in its tokenizer.json, or use the tokenizer of another model.",
        )


def check_template(tokenizer: Any) -> None:
    """Reject a chat template that hangs, writes enormous texts or ignores the messages.

    Raises:
        DataError: It does one of these, or the tokenizer has several templates and none is the default. A template that
            supports some roles only is accepted.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise DataError(
                f"None of the tokenizer's chat templates is named default, got {', '.join(template)}.", _OTHER_TEMPLATE
            )
        template = template["default"]
    if template and (problem := _try(template=template, special_tokens=_special_tokens(tokenizer))):
        raise DataError(f"The tokenizer's chat template cannot be used: it {problem}.", _OTHER_TEMPLATE)


@contextmanager
def encoding() -> Iterator[None]:
    """Turn a failure within the Rust code of a tokenizer, which is not an ``Exception``, into a ``DataError``.

    Its regular expressions give up after some million steps, and the code panics.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"The tokenizer cannot encode a text of the data ({first_line(error)}).",
            "Look for a regular expression in its tokenizer.json, or use the tokenizer of another model.",
        ) from error


@cache
def _try(**request: str) -> str | None:
    """Return what is wrong with a tokenizer or a chat template, or None."""
    code = f"import sys; sys.path = {sys.path!r}; import {__name__} as probe; probe.respond()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps({**request, "seconds": SECONDS}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=WAIT,
        )
    except subprocess.TimeoutExpired:
        return f"takes more than {WAIT} seconds"
    if -done.returncode in _OUT_OF_TIME:
        return f"takes more than {SECONDS} seconds"
    if done.returncode < 0:
        return f"ends the process with signal {-done.returncode}"
    if done.returncode:
        return f"fails ({(done.stderr.strip().splitlines() or ['no message'])[-1]})"
    problem: str | None = json.loads(done.stdout)
    return problem


def _special_tokens(tokenizer: Any) -> str:
    return json.dumps(tokenizer.special_tokens_map, default=str)


# In the separate process


def respond() -> None:
    """Read one request from standard input and write the result as JSON to standard output."""
    request = json.load(sys.stdin)
    _limit_resources(request["seconds"])
    try:
        if "tokenizer" in request:
            result: Any = _encode(request["tokenizer"])
        else:
            result = _render(request["template"], json.loads(request["special_tokens"]))
    except MemoryError:
        result = f"needs more than {MEMORY >> 30} GB of memory"
    json.dump(result, sys.stdout)


def _encode(serialized: str) -> str | None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(serialized)
    for text in TEXTS:
        try:
            tokenizer.encode(text)
        except BaseException as error:  # A panic in Rust is not an Exception.
            return f"fails ({first_line(error)})"
    return None


def _render(template: str, special_tokens: dict[str, str]) -> str | None:
    from jinja2 import TemplateError

    try:
        compiled = _environment().from_string(template)
    except TemplateError:
        return None  # The encoder reports it.
    texts = []
    for messages in CONVERSATIONS:
        for opens_response in (True, False):
            try:
                text = compiled.render(messages=messages, add_generation_prompt=opens_response, **special_tokens)
            except MemoryError:
                raise
            except Exception:  # The encoder reports the conversation that a template does not support.
                text = None
            if text is not None and len(text) > MAX_CHARACTERS:
                return f"writes {len(text)} characters for a short conversation"
            texts.append(text)
    first, second = texts[0], texts[2]
    return "writes the same text for different messages" if first == second and first is not None else None


def _environment() -> Any:
    """Return a sandbox with what chat templates may use in transformers."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the model writes."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: "today"
    return environment


def _limit_resources(seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, seconds)):
        _, most = resource.getrlimit(kind)  # A lower limit, such as that of ``ulimit -v``, cannot be raised.
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        with suppress(ValueError, OSError):  # macOS rejects a limit of the address space.
            resource.setrlimit(kind, (limit, limit))
