"""The models and the tokenizer both sides open, made from a seed and saved by transformers."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from cases import DEMONSTRATIONS, PAIRS, ROLLOUTS
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models import Transformer, train_tokenizer

REPO = Path(__file__).parents[2]
SMALL = Transformer(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128, max_length=512)


def make(work: Path) -> None:
    """Write into ``work``: ``lm``, ``reward``, ``reference`` and a policy for every rollout."""
    tokenizer = train_tokenizer(texts(), 512)
    for seed, name in enumerate(("lm", "reference")):
        torch.manual_seed(seed)
        save(SMALL.language_model(tokenizer), tokenizer, work / name)
    torch.manual_seed(2)
    config = SMALL.language_model(tokenizer).config
    config.num_labels = 1
    judge = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(judge.score.weight, std=0.3)  # scores of some size, so that advantages have one
    save(judge, tokenizer, work / "reward")
    for rollout in ROLLOUTS:
        torch.manual_seed(1)  # the reference's seed: the policy is the reference, a little moved
        policy = SMALL.language_model(tokenizer)
        move(policy, tokenizer.eos_token_id, rollout.ends)
        save(policy, tokenizer, work / f"policy-{rollout.name}")
    answers = [json.loads(line) for line in (REPO / PAIRS).read_text().splitlines()]
    rows = [{"prompt": "?", "chosen": row["chosen"], "rejected": row["rejected"]} for row in answers]
    (work / "one_token_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts() -> Iterator[str]:
    """What the tokenizer is trained on."""
    for file in (DEMONSTRATIONS, PAIRS):
        for line in (REPO / file).read_text().splitlines()[:500]:
            yield " ".join(json.loads(line).values())


@torch.no_grad()
def move(policy: PreTrainedModel, eos: int, ends: float) -> None:
    """Change all weights by a little, and the logit of EOS by about ``ends``.

    All embeddings get one direction in common, which moves every logit alike and so changes no probability; EOS gets
    more or less of it than the others.
    """
    for weight in policy.parameters():
        weight += 0.02 * torch.randn_like(weight)
    embedding = policy.get_output_embeddings().weight
    embedding += 0.1
    tokens = torch.arange(3, 67)[None]
    common = policy.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0].mean(dim=0)
    embedding[eos] += ends * common / common.square().sum()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
