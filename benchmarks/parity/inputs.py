"""Makes the models, the tokenizer and the data files that both sides read. Everything follows from seeds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import DEMONSTRATIONS, ITERATIONS, PAIRS
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models import Transformer, train_tokenizer

REPO = Path(__file__).parents[2]
SMALL = Transformer(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128, max_length=512)


def make(work: Path) -> None:
    """Write all models, among them a policy for every iteration, and two data files to ``work``."""
    tokenizer = train_tokenizer(training_texts(), 512)
    for seed, name in enumerate(("lm", "reference")):
        torch.manual_seed(seed)
        save(SMALL.language_model(tokenizer), tokenizer, work / name)
    for seed, name in ((2, "reward"), (3, "critic")):
        torch.manual_seed(seed)
        save(scalar_model(tokenizer), tokenizer, work / name)
    for setting in ITERATIONS:
        torch.manual_seed(1)  # the seed of the reference model: the policy is a perturbed copy of it
        policy = SMALL.language_model(tokenizer)
        # TRL treats a sampled pad token as the end of the response, so none may be sampled.
        perturb(policy, {tokenizer.eos_token_id: setting.eos_logit, tokenizer.pad_token_id: -9.0})
        save(policy, tokenizer, work / f"policy-{setting.name}")
    pairs = [json.loads(line) for line in (REPO / PAIRS).read_text().splitlines()]
    write(work / "one_token_prompts.jsonl", [{**pair, "document": "?"} for pair in pairs])
    write(work / "unpaired.jsonl", [unpaired(pair, i % 3 > 0) for i, pair in enumerate(pairs)])


def unpaired(pair: dict[str, str], label: bool) -> dict[str, Any]:
    """Return one response of a pair with its label: the chosen one if ``label`` is True."""
    return {"prompt": pair["document"], "completion": pair["chosen" if label else "rejected"], "label": label}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scalar_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a sequence classifier with one label, whose scores are large enough for sizable advantages."""
    config = SMALL.language_model(tokenizer).config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    return model


def training_texts() -> Iterator[str]:
    """Yield the texts that the tokenizer is trained on."""
    for file in (DEMONSTRATIONS, PAIRS):
        for line in (REPO / file).read_text().splitlines()[:500]:
            yield " ".join(json.loads(line).values())


@torch.no_grad()
def perturb(policy: PreTrainedModel, logits: dict[int, float]) -> None:
    """Change all weights slightly, and the logits of some tokens by approximately the given amounts.

    A constant is added to all embeddings, which shifts all logits alike and so changes no probability. The embeddings
    of the given tokens then move along the direction that all hidden states share.
    """
    for weight in policy.parameters():
        weight += 0.02 * torch.randn_like(weight)
    embedding = policy.get_output_embeddings().weight
    embedding += 0.1
    tokens = torch.arange(3, 67)[None]
    common = policy.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0].mean(dim=0)
    for token, change in logits.items():
        embedding[token] += change * common / common.square().sum()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
