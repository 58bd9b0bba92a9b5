"""The files of evaluation, and its table."""

import json
from io import StringIO
from pathlib import Path

from rich.console import Console

from rlhf.evaluate.metrics import ModelResponses
from rlhf.evaluate.report_output import comparison_table, write_samples
from rlhf.files import write_json
from rlhf.metrics.evaluation_names import TARGET

INTERVAL = {"mean": 0.5, "low": 0.25, "high": 0.75}
RATE = {"value": 0.75, "low": 0.5, "high": 1.0}
METRICS = {
    "prompts": 2,
    "models": {
        "sft": {"gold": INTERVAL, "kl_to_sft": INTERVAL},
        "ppo": {"gold": INTERVAL, "kl_to_sft": INTERVAL, "win_rate_vs_sft": {"gold": RATE}},
    },
}


def test_metrics_are_written_as_json(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", METRICS)
    assert json.loads((tmp_path / "metrics.json").read_text()) == METRICS


def test_samples_have_one_line_per_prompt(tmp_path: Path) -> None:
    """Metrics are rounded to four digits. The targets are not listed as a model."""
    responses = {
        "sft": ModelResponses(["a", "é"], {"length": [1.0, 2.0], "reward": [0.123456, -1.0]}),
        TARGET: ModelResponses(["t", "u"], {"length": [1.0, 1.0]}),
    }
    write_samples(tmp_path / "samples.jsonl", ["p", "q"], ["t", None], responses)
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": "p", "target": "t", "responses": {"sft": {"text": "a", "length": 1.0, "reward": 0.1235}}},
        {"prompt": "q", "target": None, "responses": {"sft": {"text": "é", "length": 2.0, "reward": -1.0}}},
    ]
    assert "é" in lines[1]


def test_table_shows_the_columns_that_have_values() -> None:
    """There is no reward model and there are no targets, so their columns are left out."""
    console = Console(file=StringIO(), width=120)
    console.print(comparison_table(METRICS, baseline="sft", output=Path("outputs/evaluation")))
    text = console.file.getvalue()
    assert "2 held-out prompts" in text
    assert "gold wins" in text
    assert "0.50..1.00" in text
    assert "RM wins" not in text
    assert "ROUGE" not in text
    assert "outputs/evaluation" in text


def test_names_and_paths_in_the_table_are_text() -> None:
    """Brackets are not the markup of rich, and control characters are escaped."""
    models = {"[/b]\x1b": {"gold": INTERVAL}, "[a1]_best_of_4": {"win_rate_vs_[/b]\x1b": {"gold": RATE}}}
    console = Console(file=StringIO(), width=200)
    metrics = {"prompts": 2, "models": models}
    console.print(comparison_table(metrics, baseline="[/b]\x1b", output=Path("exp[a1]/[/i]")))
    text = " ".join(console.file.getvalue().split())  # The caption wraps.
    shown = ("vs [/b]\\x1b", "KL to [/b]\\x1b, nats", "metrics are in exp[a1]/[/i].", " [a1] ", "best of 4")
    assert [part for part in shown if part not in text] == []
    assert "\x1b" not in text
