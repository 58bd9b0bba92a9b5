"""Every command and every snippet of the README runs, on a small budget, in a folder laid out as a user's clone."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SMALL = ["model.hidden_size=32", "model.num_layers=1", "model.vocab_size=400"]
BUDGET = ["trainer.max_steps=2", "trainer.limit_val_batches=1", "data.max_rows=32", "trainer.enable_progress_bar=false"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[str]:
    """Each ``python train.py ...`` of the README's bash blocks, in order."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line[line.index("train.py") :] for line in lines if "train.py" in line]


@pytest.fixture(scope="module")
def clone(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.py, conf/ and data/ as in a clone, and the files the README's reader is told to bring along."""
    from rlhf.models import Transformer, chat_template

    folder = tmp_path_factory.mktemp("clone")
    shutil.copy(repo / "train.py", folder)
    for name in ("conf", "data"):
        shutil.copytree(repo / name, folder / name)
    rows = [{"document": f"Ask {i}, please.", "target": f"Answer {i}."} for i in range(40)]
    pairs = [{"prompt": f"Ask {i}, please.", "chosen": f"Answer {i}.", "rejected": f"No {i}."} for i in range(40)]
    for name, records in {"my_demonstrations.jsonl": rows, "my_pairs.jsonl": pairs}.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "my_scorer.py").write_text(
        "def score(prompts, answers):\n    return [-len(answer) for answer in answers]\n"
    )
    source = Transformer(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32, vocab_size=300)
    tokenizer = source.tokenizer(row["document"] for row in rows)
    tokenizer.chat_template = chat_template("{prompt}\n")
    source.language_model(tokenizer).save_pretrained(folder / "my_model")
    tokenizer.save_pretrained(folder / "my_model")
    return folder


def run(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=clone, capture_output=True, text=True, check=False)


def budget(command: str) -> list[str]:
    """What keeps a command of the README short: few rows, few steps, a tiny model where it starts from nothing."""
    small = [] if "model=pretrained" in command else SMALL
    if "stage=evaluate" in command:
        return [*small, "data.max_rows=8", "trainer.enable_progress_bar=false"]
    return [*small, *BUDGET]


@pytest.mark.slow
def test_every_command_of_the_readme_runs(clone: Path) -> None:
    """In the README's order: later commands read what earlier ones left behind."""
    found = commands()
    assert len(found) > 12
    for command in found:
        words = shlex.split(command)
        done = run(clone, *words, *([] if "--cfg" in words else budget(command)))
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    for name in ("rlhf/final_rl_model.pt", "mine/ppo/ppo_final.pt", "mine/evaluation/metrics.json"):
        assert (clone / "outputs" / name).is_file()
    for snippet in blocks("python"):
        done = run(clone, "-c", snippet)
        assert done.returncode == 0, f"{snippet}\n{done.stderr[-4000:]}"


def test_the_main_commands_are_the_ones_of_a_bare_machine() -> None:
    """Debian's python refuses pip outside a virtual environment, so both commands make one."""
    first, second = (line for block in blocks("bash") for line in block.splitlines() if "pip install" in line)
    assert first == "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python train.py"
    assert second == "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"


def test_every_metric_that_is_logged_stands_in_the_readme(repo: Path) -> None:
    """Names in quotes in the modules of the training stages, against the first column of the metrics table."""
    table = README.split("## Metrics")[1].split("## Hyper-parameters")[0]
    listed = set(re.findall(r"`([a-zA-Z_/]+)`", table))
    files = [repo / "rlhf" / "stage.py", repo / "rlhf" / "rl" / "numbers.py", *(repo / "rlhf" / "dpo").glob("*.py")]
    files += [repo / "rlhf" / name / "module.py" for name in ("sft", "reward", "rl", "ppo", "grpo")]
    text = "".join(file.read_text() for file in files)
    logged = set(re.findall(r'"((?:objective|policy|loss|response|rewards|logps|throughput|train|val)/\w+)"', text))
    assert len(logged) > 20
    assert logged - listed == set()


def test_every_alarm_stands_in_the_readme() -> None:
    """With what to turn: the troubleshooting table and the log say the same."""
    from rlhf.alerts import ADVICE

    table = README.split("## Troubleshooting")[1]
    for name, advice in ADVICE.items():
        assert f"| `{name}` |" in table
        row = next(line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
        keys = set(re.findall(r"(?:stage|trainer)\.[a-z_.]+", str(advice)))
        assert keys <= set(re.findall(r"(?:stage|trainer)\.[a-z_.]+", row)), name
