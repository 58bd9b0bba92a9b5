"""Evaluation by two processes, which share the prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
from evaluate.test_module import Evaluation, FakeSampler, shifted
from transformers import PreTrainedTokenizerFast

from harness import DEMONSTRATIONS, FakeSource, tiny_reward_model
from ranks import DDP, in_ranks


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here."""
    return "transformer"


def evaluate(
    rank: int, folder: Path, gold: Path, tokenizer: Any, policy: FakeSource, trainer: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate two models on 7 prompts with responses that do not depend on the random state."""
    evaluation = Evaluation(folder / str(rank), tokenizer)
    evaluation.folder.mkdir(parents=True)
    module = evaluation.run(
        DEMONSTRATIONS[:7],
        trainer=trainer,
        models={"sft": policy, "ppo": shifted(policy)},
        reward_model=FakeSource(tiny_reward_model(policy.model)),
        gold=f"{gold}:score",
        sampler=FakeSampler(),
    )
    files = sorted(path.name for path in (evaluation.folder / "out").glob("*"))
    samples = evaluation.folder / "out" / "samples.jsonl"
    lines = [json.loads(line) for line in samples.open(newline="\n")] if files else []
    return {"metrics": module.metrics, "monitored": module.monitored, "files": files, "samples": lines}


def test_two_ranks_evaluate_like_one(policy: FakeSource, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """7 prompts in batches of 3 per rank: one rank has no row in the second batch, and repeats none.

    All metrics, their intervals and the order of the samples are those of one process. Both ranks know the metrics, and
    rank 0 writes the files.
    """
    gold = tmp_path / "gold.py"
    gold.write_text("def score(prompts, responses): return [len(response) for response in responses]")
    expected = evaluate(0, tmp_path / "one", gold, tokenizer, policy, {})
    first, second = in_ranks(evaluate, tmp_path / "two", gold, tokenizer, policy, DDP)
    assert first["samples"] == approximately(expected["samples"])
    for rank in (first, second):
        assert rank["metrics"] == approximately(expected["metrics"])
        assert rank["monitored"] == expected["monitored"]
    assert first["files"] == ["metrics.json", "samples.jsonl"]
    assert second["files"] == []


def approximately(value: Any) -> Any:
    """Compare all numbers in nested lists and dictionaries with a relative tolerance of 1e-5."""
    if isinstance(value, dict):
        return {key: approximately(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [approximately(entry) for entry in value]
    return pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value
