"""Banned words: one concept has one term, spelling is American, and phrases that readers stumbled over stay out.

Prose is every docstring, comment, error or log message, yaml comment and markdown page. Names are identifiers, file
names and configuration keys. To quote a banned word, or to use one in another sense, extend ``ALLOWED``.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from contract.configs import ROOT

RATES = r"\b(nats|units?|tokens|log-probs?|means?|seconds|rewards?)"
BRITISH_STEMS = (
    "normal|optim|regular|initial|general|organ|recogn|minim|maxim|penal|summar|serial|token|special|memor|real|util"
    "|standard|central|parallel|quant|vector|visual|character|emphas|prior|final"
)
# Pattern in prose -> what to write instead.
BANNED_PROSE = {
    rf"{RATES} an? (response|token|pair|step|row|text|prompt|sequence)\b": "per response, per token, ...",
    r"\banswer(s|ed|ing)?\b": "response; sample; score",
    r"\bjudg(e|es|ed|ing)\b": "reward model; score",
    r"\bverdicts?\b": "unpaired preference",
    r"\bfigures? of merit\b": "monitored metric",
    r"\bbesides?\b": "in addition to, alongside, compared with",
    r"\banew\b": "again",
    r"\bstands? (on|in|at|there|together|behind)\b": "is in, is based on",
    r"\blies? (in|on|there|together|next)\b": "is in, is stored in",
    r"\b(says?|said|speaks?|told|tells) of\b": "describes, refers to, reports",
    r"\bwhat \w+( \w+)? says?\b": "the output of",
    r"\bprices?\b": "penalty, coefficient",
    r"\b(charged?|charges|charging)\b": "applied, subtracted",
    r"\bof (its|their) own\b": "separate, own",
    r"\bleaves? behind\b": "writes, returns",
    r"\bless (the|its|their) (mean|score|reward|penalty|reference|group)": "minus",
    r"(?<!there )\bis no (list|probability|number|distance|share|path|folder|choice|valid)\b": "must be ..., got ...",
    r"\b(alarms?|sounds? an?|rings?)\b": "alert; fires",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bthe (house|room|ground)\b": "project, package, layer",
    r"\bturn it when\b": "when to change it",
    rf"\b\w*(?:{BRITISH_STEMS})is(?:e|ed|es|ing|ation|er)s?\b": "American spelling: -ize",
    r"\b(colours?|behaviours?|favours?|neighbours?|grey|centres?|centred|centring|labelled|labelling|modelling)\b": (
        "American spelling"
    ),
    r"\b(cancelled|travelled|catalogue|analyse[ds]?|artefacts?|judgement|licence|unlabelled|honours?)\b": (
        "American spelling"
    ),
}
# Parts of names, which are split at underscores and capitals.
BANNED_NAMES = {
    *(
        "answer",
        "answers",
        "judge",
        "judges",
        "verdict",
        "verdicts",
        "merit",
        "anew",
        "beside",
        "price",
        "alarm",
        "alarms",
    ),
    *(
        "normalise",
        "normalised",
        "normalisation",
        "normaliser",
        "optimise",
        "optimised",
        "overoptimisation",
        "centring",
    ),
    *("colour", "colours", "neighbour", "neighbours", "behaviour", "labelled", "penalise", "penalised", "regularised"),
    *("spreads", "lookback", "rollouted"),
}
BANNED_WHOLE_NAMES = {"look_back", "seen_in", "seen_besides", "figure_of_merit", "spread_coef", "roll_out"}
# (file pattern, word) -> reason.
ALLOWED = {
    ("CHANGELOG.md", "*"): "history: old names are quoted next to the new ones",
    ("tests/contract/test_language.py", "*"): "the list itself",
}
FOLDERS = ("rlhf", "tests", "benchmarks", "data", "docs", "examples", "conf")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md", ".yaml", ".yml") and "site" not in path.parts
) + [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "train.py")]
MESSAGE_CALLS = re.compile(r"(Error|Exception|Stopped|Check)$|^(log|logger|warnings?|pytest)\.")


def python_prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of comments, docstrings, and messages of errors and logs."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            yield node.body[0].lineno, ast.get_docstring(node, clean=False) or ""
        elif isinstance(node, ast.Call) and MESSAGE_CALLS.search(ast.unparse(node.func)):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def without_code(text: str) -> str:
    """Remove the glossary's table, fenced blocks, code spans and targets of links from markdown; line numbers stay."""
    hidden = r"<!-- glossary -->.*?<!-- /glossary -->|```.*?```"
    text = re.sub(hidden, lambda block: "\n" * block[0].count("\n"), text, flags=re.S)
    return re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>", "", text)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of all prose of a file; code in backticks is not prose."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for line, text in python_prose(source):
            yield line, re.sub(r"``[^`]*``|`[^`]*`|'[^'\s]*'", "", text)
    elif path.suffix == ".md":
        yield from enumerate(without_code(source).splitlines(), 1)
    else:
        yield from (
            (number, line[line.index("#") :]) for number, line in enumerate(source.splitlines(), 1) if "#" in line
        )


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of identifiers, of configuration keys, and of the file name itself."""
    yield 0, path.stem
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NAME:
                yield token.start[0], token.string
    elif path.suffix in (".yaml", ".yml"):
        for number, line in enumerate(source.splitlines(), 1):
            if key := re.match(r"\s*(\w+):", line):
                yield number, key[1]


def is_allowed(path: Path, word: str) -> bool:
    name = str(path.relative_to(ROOT))
    return any(fnmatch(name, files) and fnmatch(word.lower(), words) for files, words in ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_uses_the_terms_of_the_field(path: Path) -> None:
    found = []
    for line, text in prose(path):
        for pattern, instead in BANNED_PROSE.items():
            for match in re.finditer(pattern, text, flags=re.I):
                if not is_allowed(path, match[0]):
                    number = line + text[: match.start()].count("\n")
                    found.append(f"{path.relative_to(ROOT)}:{number}: '{match[0]}'; write: {instead}")
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_use_the_terms_of_the_field(path: Path) -> None:
    found = []
    for line, name in names(path):
        parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
        if (parts & BANNED_NAMES or name in BANNED_WHOLE_NAMES) and not is_allowed(path, name):
            found.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not found, "\n" + "\n".join(sorted(set(found)))


@pytest.mark.parametrize("text", ["0.5 nats a response", "the reward less the mean", "optimised", "beside the point"])
def test_the_patterns_match(text: str) -> None:
    """The tests above can fail."""
    assert any(re.search(pattern, text) for pattern in BANNED_PROSE)
