"""A run as its stages leave it, without training: configurations, logs, event files, metrics and samples."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from rlhf.files import write_json
from rlhf.stages import stages

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=alert(1)>"
LINE_SEPARATOR = chr(0x2028)
TEXTS = {
    "markup": HOSTILE,
    "long": "word " * 4000,
    "right-to-left": "مرحبا بالعالم",
    "emoji": "👩‍👩‍👧 😀",
    "separator": f"a{LINE_SEPARATOR}b & c",
    "surrogate": "\ud800 alone",
}


def rate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.0303, "high": value + 0.0207}


def mean(value: float) -> dict[str, float]:
    return {"mean": value, "low": value - 0.1101, "high": value + 0.2202}


EVALUATION: dict[str, Any] = {
    "prompts": 6,
    "models": {
        "sft": {"gold": mean(0.53363), "kl_to_sft": mean(0.0), "reward": mean(0.89512)},
        "ppo": {
            "gold": mean(0.76727),
            "kl_to_sft": mean(1.52113),
            "reward": mean(2.23853),
            "win_rate_vs_sft": {"gold": rate(0.85667), "reward": rate(0.88501)},
        },
        "target": {"gold": mean(0.39083), "win_rate_vs_sft": {"gold": rate(0.32333)}},
    },
}
REWARD: dict[str, Any] = {
    "kind": "pairs",
    "count": 500,
    "heads": 1,
    "accuracy": 0.8903,
    "calibration_error": 0.06035,
    "longer_chosen": {"count": 237, "accuracy": 0.87342},
    "length_correlation": {"pearson": -0.10264, "spearman": None},
    "by_confidence": [
        {"low": 0.5, "high": 0.7, "count": 50, "confidence": 0.6123, "accuracy": 0.8211},
        {"low": 0.7, "high": 0.9, "count": 50, "confidence": 0.8345, "accuracy": 0.8622},
    ],
    "by_length": [{"low": 4.0, "high": 14.0, "count": 236, "length": 10.127, "score": -0.20825}],
}
CURVES: dict[str, dict[str, list[tuple[int, float]]]] = {
    "sft": {"train/loss": [(1, 3.5), (2, 2.25), (3, 1.125)], "val/loss": [(3, 1.25)]},
    "reward": {"train/loss": [(1, 0.75), (2, 0.5)]},
    "ppo": {
        "objective/scores": [(4, 0.5), (8, 1.5), (12, 2.5)],
        "objective/kl": [(4, 0.25), (8, 1.25), (12, 11.0)],
        "val/score": [(12, 2.125)],
        "alerts/kl": [(4, 0.0), (8, 0.0), (12, 1.0)],
    },
}
PROVENANCE = {
    "data": {"train": {"path": "data/mine.jsonl", "sha256": "c64ed9ac"}},
    "inputs": {"policy": [{"source": "Export(path='o/sft/sft_final.pt', attention=None)", "sha256": "cd657555"}]},
    "versions": {"rlhf": "0.1.0", "torch": "2.13.0"},
}


def write_events(directory: Path, curves: Mapping[str, list[tuple[int, float]]]) -> Path:
    """Write an event file with scalars and return its path."""
    writer = EventFileWriter(str(directory))
    for name, points in curves.items():
        for step, value in points:
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            writer.add_event(Event(step=step, wall_time=1.0, summary=summary))
    writer.close()
    return next(directory.glob("events.out.tfevents.*"))


def write_stage(run: Path, stage: str, name: str | None = None) -> Path:
    """Write what a stage leaves in its directory."""
    directory = run / (name or stage)
    (directory / ".hydra").mkdir(parents=True)
    config = {"stage_name": stage, "run": run.name, "stage": {"kl_coef": 0.1, "note": HOSTILE}, "paths": {"run": "x"}}
    (directory / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    (directory / ".hydra" / "overrides.yaml").write_text(f"- stage={stage}\n- run={run.name}\n- stage.kl_coef=0.1\n")
    log = f"2026-01-01 00:00:00,000 INFO step=1 x=1\n2026-01-01 00:00:09,000 INFO stage={stage} took 61 s; done\n"
    if stage == "ppo":
        log += "2026-01-01 00:00:05,000 WARNING alert kl at step 12: objective/kl is 11. Raise stage.kl_coef.\n"
        log += f"2026-01-01 00:00:06,000 WARNING {HOSTILE}\n"
    (directory / f"{stage}.log").write_text(log)
    if stage in CURVES:
        write_events(directory / "tensorboard" / "version_0", CURVES[stage])
    if final := stages()[stage].final:
        torch.save({"format": 1, "provenance": json.dumps(PROVENANCE), "weights": torch.zeros(2)}, directory / final)
    return directory


def write_samples(path: Path) -> None:
    rows = [
        {
            "prompt": f"prompt {name} {text}",
            "target": text,
            "responses": {
                "sft": {"text": "the old words", "reward": 0.25, "gold": 0.5},
                "ppo": {"text": text, "reward": number + 0.125, "gold": 0.75},
            },
        }
        for number, (name, text) in enumerate(TEXTS.items())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A run with SFT, reward model, PPO and evaluation."""
    run = tmp_path / "outputs" / "mine"
    write_stage(run, "sft")
    write_json(write_stage(run, "reward") / "metrics.json", REWARD)
    write_stage(run, "ppo")
    evaluation = write_stage(run, "evaluate", "evaluation")
    write_json(evaluation / "metrics.json", EVALUATION)
    write_samples(evaluation / "samples.jsonl")
    return run


def damage(path: Path) -> None:
    """Cut a file in half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
