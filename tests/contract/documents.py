"""Run what documents tell the reader to type, on a small budget, in a temporary clone of the repository."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from contract.configs import ROOT
from forked import run_python

SMALL_MODEL = ["model.hidden_size=32", "model.num_layers=1", "model.vocab_size=400"]
SMALL_BUDGET = [
    "trainer.max_steps=2",
    "trainer.limit_val_batches=1",
    "data.max_rows=32",
    "trainer.enable_progress_bar=false",
]


def fenced_blocks(markdown: str, language: str) -> list[tuple[str, str]]:
    """Return title and content of every fenced block of a language; the title is "" where there is none."""
    found = re.findall(rf"^( *)```{language}\b([^\n]*)\n(.*?)^\1```", markdown, flags=re.S | re.M)
    blocks = []
    for indent, attributes, content in found:
        title = re.search(r'title="([^"]+)"', attributes)
        blocks.append((title[1] if title else "", re.sub(rf"^{indent}", "", content, flags=re.M)))
    return blocks


def commands(markdown: str) -> list[str]:
    """Return every ``python ...`` command of the bash blocks in order, without what precedes ``python`` on its line."""
    found = []
    for _, block in fenced_blocks(markdown, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.split(r"\s+#", line)[0]
            if match := re.search(r"(?:^|[\s/])python3? ((?!-m venv)\S.*)$", line):
                found.append(match[1].strip())
    return found


def overrides_of(command: str) -> list[str]:
    """Return the Hydra overrides of a ``train.py ...`` command."""
    return [word for word in shlex.split(command)[1:] if "=" in word and not word.startswith("-")]


def make_clone(folder: Path, *, package: bool = False) -> Path:
    """Lay out train.py, conf/ and data/ as in a clone, and the files that a reader brings along.

    Args:
        folder: Empty directory.
        package: Also copy rlhf/, for guides that add files to it.
    """
    from rlhf.models import Transformer, chat_template

    shutil.copy(ROOT / "train.py", folder)
    for name in ("conf", "data", "examples", *(["rlhf", "tests"] if package else [])):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    demonstrations = [{"document": f"Ask {i}, please.", "target": f"Answer {i}."} for i in range(40)]
    pairs = [{"prompt": f"Ask {i}, please.", "chosen": f"Answer {i}.", "rejected": f"No {i}."} for i in range(40)]
    prompts = [{"prompt": row["prompt"]} for row in pairs]
    files = {"my_demonstrations": demonstrations, "my_pairs": pairs, "my_prompts": prompts}
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "my_scorer.py").write_text(
        "def score(prompts, responses):\n    return [-len(response) for response in responses]\n"
    )
    source = Transformer(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32, vocab_size=300)
    tokenizer = source.tokenizer(row["document"] for row in demonstrations)
    tokenizer.chat_template = chat_template("{prompt}\n")
    source.language_model(tokenizer).save_pretrained(folder / "my_model")
    tokenizer.save_pretrained(folder / "my_model")
    return folder


def budget(command: str) -> list[str]:
    """Return overrides that keep a training command short: few rows, few steps, and a tiny model from scratch.

    The first pipeline writes a report, and later ones do not.
    """
    if not command.startswith("train.py") or "--cfg" in command or "--help" in command:
        return []
    model = [] if "model=pretrained" in command else SMALL_MODEL
    if "stage=evaluate" in command:
        return [*model, "data.max_rows=8", "trainer.enable_progress_bar=false"]
    repeats_pipeline = any(word in command for word in ("pipeline.", "experiment=compare", "train.py resume=true"))
    rounds = ["pipeline.rounds=1"] if "pipeline.rounds=" in command else []
    return [*model, *SMALL_BUDGET, *rounds, *(["pipeline.report=false"] if repeats_pipeline else [])]


def run_in_clone(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the clone; a copy of rlhf/ in it takes precedence over the installed package."""
    return run_python(arguments, clone, {**os.environ, "PYTHONPATH": str(clone)})


def assert_command_runs(clone: Path, command: str) -> None:
    """Run a command of a document on a small budget."""
    done = run_in_clone(clone, *shlex.split(command), *budget(command))
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
