"""Prompts are drawn at random, but the same ones every time."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.collect import CollectDataModule


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {number}"}) + "\n" for number in range(20)))
    return str(path)


def drawn(prompts: str, tokenizer: PreTrainedTokenizerFast, count: int | None, seed: int) -> list[str]:
    data = CollectDataModule(
        train=prompts, max_length=64, num_prompts=count, seed=seed, val_fraction=0.0, tokenizer=tokenizer
    )
    return [record.raw_text for record in data.records("train")]


def test_prompts_are_drawn_with_the_seed(prompts: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """In the order of the file, and without repetition."""
    first, again, other = (drawn(prompts, tokenizer, 5, seed) for seed in (1, 1, 2))
    numbers = [int(text.split()[1]) for text in first]
    assert numbers == sorted(set(numbers))
    assert len(first) == 5
    assert first == again != other


@pytest.mark.parametrize("count", [None, 20, 21])
def test_all_prompts_are_used_if_there_are_no_more(
    prompts: str, tokenizer: PreTrainedTokenizerFast, count: int | None
) -> None:
    assert drawn(prompts, tokenizer, count, 1) == [f"Question {number}" for number in range(20)]
