"""One self-contained HTML file: templates, style sheet and script, and a policy that forbids everything else."""

import base64
import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf import __version__
from rlhf.files import atomic_write

TEMPLATES = Path(str(files("rlhf.report") / "templates"))
# U+2028 and U+2029 end a line in old versions of JavaScript. ASCII output escapes them, and lone surrogates as well.
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def write_page(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Render a template and write the page atomically."""
    html = render(template, content)
    data = html.encode("utf-8", errors="replace")  # A lone surrogate has no UTF-8.
    atomic_write(path, lambda file: file.write(data), concurrent=True)


def render(template: str, content: Mapping[str, Any]) -> str:
    """Return a page as text.

    Every text in ``content`` is escaped. The page may run its script and apply its style sheet, both known by their
    hashes, and nothing else: it loads nothing, submits nothing, and runs nothing that is contained in a text.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["json_data"] = json_data
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; style-src '{source_hash(style)}'; script-src '{source_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(template).render(
        **content,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        version=__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def json_data(content: Any) -> Markup:
    """Return JSON that may be part of a script element of HTML, whatever texts it contains."""
    encoded = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for char, escape in ESCAPES.items():
        encoded = encoded.replace(char, escape)
    return Markup(encoded)


def source_hash(source: str) -> str:
    """Return the hash by which a content security policy permits an inline style sheet or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"
