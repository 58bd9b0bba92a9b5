"""Every fix that an error suggests works: each ``key=value`` in it composes with a stage that has the key.

The suggestions are read from the source: all string arguments of ``ConfigError``, ``DataError`` and their relatives.
A placeholder in angle brackets, such as ``<path>``, and a field of an f-string stand for any value.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from contract.configs import CONF, HYDRA_KEYS, ROOT, STAGES, choices, compose_config, composed_dict, leaf_keys
from contract.imports import FILES
from rlhf.stages import commands, stages

ERRORS = {"UserError", "ConfigError", "DataError", "RecordError"}
FIELD = "\N{REPLACEMENT CHARACTER}"  # stands for a field of an f-string
VALUE = r"""(\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|<[^>]*>[^\s,;'")]*|[^\s,;'")]+)"""
OVERRIDE = re.compile(rf"""(?:^|[\s'"(`])([a-z_{FIELD}][\w.{FIELD}]*)={VALUE}""")
MENTIONED_KEY = re.compile(
    rf"\b((?:stage|data|trainer|model|adapter|reward|callbacks|pipeline|paths|command)\.[a-z_{FIELD}][\w.{FIELD}]*)(?!\w*\()"
)
# Words before an equals sign that are Python arguments, not keys: the error tells what to write in code.
PYTHON_ARGUMENTS = {"base", "weights_only", "torch_dtype", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"}


def text_of(node: ast.AST) -> str:
    """Return a string literal, an f-string with ``FIELD`` for each field, or joined parts of other expressions."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(FIELD if isinstance(part, ast.FormattedValue) else text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return f"{text_of(node.body)} {text_of(node.orelse)}"
    return ""


def error_texts() -> Iterator[tuple[str, str, bool]]:
    """Yield location and text of every argument of an error, and whether the text is the fix."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ERRORS:
                for position, argument in enumerate([*node.args, *(word.value for word in node.keywords)]):
                    yield f"{file.relative_to(ROOT)}:{argument.lineno}", text_of(argument), position == 1


def suggestions() -> list[tuple[str, str]]:
    """Return location and override of everything that a fix asks the user to type."""
    return [
        (location, f"{key}={value.rstrip('.')}")
        for location, text, is_fix in error_texts()
        if is_fix
        for key, value in OVERRIDE.findall(text)
        if key not in PYTHON_ARGUMENTS
    ]


@cache
def groups() -> set[str]:
    return {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra", "rl"}


@cache
def known_keys() -> list[str]:
    """Return every key of every stage and choice."""
    cases = [(f"stage={stage}",) for stage in (*STAGES, "pipeline", *commands())]
    some_stage = {
        group: info.name for info in stages().values() for group in (*info.groups, "model", "data", "adapter")
    }
    cases += [
        (f"stage={stage}", f"{group}={name}")
        for group, stage in some_stage.items()
        for name in choices(group)
        if group != "rl"
    ]
    return list(dict.fromkeys(key for overrides in cases for key in all_keys(composed_dict(*overrides))))


def all_keys(node: dict[str, Any]) -> list[str]:
    """Return the dotted keys of all values, followed by those of all dictionaries."""
    leaves = leaf_keys(node)
    return sorted(leaves) + sorted({key.rsplit(".", n)[0] for key in leaves for n in range(1, key.count(".") + 1)})


def find_key(key: str) -> str | None:
    """Return a known key that matches ``key``. Fields stand for any name."""
    pattern = re.compile(re.escape(key).replace(FIELD, r"[\w.]+"))
    if match := next((name for name in known_keys() if pattern.fullmatch(name)), None):
        return match
    node, _, special = key.rpartition(".")
    return key if special in HYDRA_KEYS | {FIELD} and node in known_keys() else None


def fill(value: str) -> str:
    """Replace placeholders and fields by a plain value."""
    return re.sub(rf"<[^>]*>|{FIELD}", "1", value)


@pytest.mark.parametrize(("location", "override"), suggestions(), ids=lambda value: value.replace(FIELD, "*"))
def test_every_suggested_override_composes(location: str, override: str) -> None:
    key, value = override.split("=", 1)
    if key in groups():
        compose_group(key, value)
        return
    found = find_key(key)
    assert found is not None, f"{location}: no stage has the key {key}"
    if found in groups():
        compose_group(found, value)
        return
    assert OverridesParser.create().parse_override(f"{found}={fill(value)}").key_or_group == found


def compose_group(group: str, value: str) -> None:
    """Compose a choice of a group with a stage that has the group."""
    stage = next((info.name for info in stages().values() if group in info.groups), "sft")
    choice = next(iter(choices(group))) if FIELD in value or "<" in value else value
    compose_config(*([] if group == "stage" else [f"stage={stage}"]), f"{group}={choice}")


def test_keys_in_messages_exist() -> None:
    """Neither a message nor a fix names a key that no stage has."""
    unknown = [
        f"{location}: {key}"
        for location, text, _ in error_texts()
        for key in chain.from_iterable(match.groups() for match in MENTIONED_KEY.finditer(text))
        if find_key(key.rstrip(".")) is None and not key.endswith((".py", ".json", ".yaml", ".pt"))
    ]
    assert unknown == []


def test_most_errors_have_a_fix() -> None:
    """The reader of the source finds them."""
    assert len(suggestions()) > 40
