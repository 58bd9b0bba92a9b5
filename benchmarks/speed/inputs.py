"""The models, the tokenizer and the texts of the benchmark, made once in the work directory."""

import json
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Mamba2Config,
    Mamba2ForCausalLM,
)

from rlhf.models import train_tokenizer

# Layers, width and vocabulary. Weights are random, because they do not change the time of a step.
SIZES = {"T": (4, 256, 8192), "S": (8, 512, 32000)}
PAIRS, LONG_PROMPTS, DEMONSTRATIONS = "pairs.jsonl", "long_prompts.jsonl", "demonstrations.jsonl"


def make(work: Path, demonstrations: Path, pairs: Path, solutions: Path, sizes: list[str]) -> None:
    """Write models and texts.

    Args:
        work: The work directory.
        demonstrations: JSON Lines with ``document`` and ``target``.
        pairs: JSON Lines with ``prompt``, ``chosen`` and ``rejected``.
        solutions: Like ``pairs``, about the documents of ``demonstrations``. Two demonstrations before each prompt
            make long prompts with short responses.
        sizes: Keys of ``SIZES``.
    """
    work.mkdir(parents=True, exist_ok=True)
    shown = read(demonstrations)
    (work / DEMONSTRATIONS).write_text(demonstrations.read_text())
    (work / PAIRS).write_text(pairs.read_text())
    examples = [f"{row['document']}\n{row['target']}\n\n" for row in shown]
    long_prompts = [
        {**row, "prompt": examples[2 * i % len(examples)] + examples[(2 * i + 1) % len(examples)] + row["prompt"]}
        for i, row in enumerate(read(solutions))
    ]
    (work / LONG_PROMPTS).write_text("".join(json.dumps(row) + "\n" for row in long_prompts))
    texts = [text for row in [*shown, *read(pairs)] for text in row.values() if isinstance(text, str)]
    for size in sizes:
        layers, width, vocabulary = SIZES[size]
        if (work / size / "mamba").exists():
            continue
        tokenizer = train_tokenizer(texts, vocabulary)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 16 * 16,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            num_labels=1,
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        )
        mamba = Mamba2Config(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_heads=width // 32,
            n_groups=1,
            tie_word_embeddings=False,
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        )
        torch.manual_seed(0)
        for name, model in (
            ("lm", LlamaForCausalLM(config)),
            ("reward", LlamaForSequenceClassification(config)),
            ("mamba", Mamba2ForCausalLM(mamba)),
        ):
            model.save_pretrained(work / size / name)
            tokenizer.save_pretrained(work / size / name)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.open(encoding="utf-8", newline="\n")]
