"""A careful loop in plain PyTorch on our batches: the trunk, logits of response tokens, fused AdamW, and no metrics.

python benchmarks/speed/bare.py sft WORK/T/lm WORK/demonstrations.jsonl RESULT --rows OURS --batch-size 16
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import Steps
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data import EncodedResponse, SequenceBatch
from rlhf.process.heap import keep_heap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["sft", "dpo", "dpo_live", "reward"])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("result")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    keep_heap()
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    records = [json.loads(line) for line in options.data.open(encoding="utf-8", newline="\n")]
    order = json.loads(options.rows.read_text())["rows"][: options.steps]
    batches = [SequenceBatch.collate(encode([records[i] for i in rows], tokenizer)) for rows in order]
    lm: Any = AutoModelForCausalLM.from_pretrained(options.model).train()
    reference: Any = AutoModelForCausalLM.from_pretrained(options.model) if options.stage.startswith("dpo") else None
    head = torch.nn.Linear(lm.config.hidden_size, 1)
    optimizer = torch.optim.AdamW([*lm.parameters(), *head.parameters()], lr=1e-4, fused=True)
    known = [summed_logprobs(reference, batch) for batch in batches] if options.stage == "dpo" else None
    steps = Steps(options.result)
    steps.watch(lm.base_model)
    for number, batch in enumerate(batches):
        if options.stage == "reward":
            scores = head(states(lm, batch)[torch.arange(len(batch.input_ids)), batch.attention_mask.sum(1) - 1])[:, 0]
            loss = -F.logsigmoid(torch.sub(*scores.chunk(2))).mean()
        elif options.stage == "sft":
            loss = -token_logprobs(lm, batch).mean()
        else:
            ref = summed_logprobs(reference, batch) if known is None else known[number]
            loss = -F.logsigmoid(0.1 * torch.sub(*(summed(token_logprobs(lm, batch), batch) - ref).chunk(2))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.end(len(order[number]), batch.token_count)


def encode(rows: list[dict[str, str]], tokenizer: Any, max_length: int = 512) -> list[EncodedResponse]:
    """Return the rows as token ids: all chosen responses, then all rejected ones."""
    names = [name for name in ("target", "chosen", "rejected") if name in rows[0]]
    encoded = []
    for name in names:
        for row in rows:
            prompt = tokenizer(f"{row.get('document') or row['prompt']}\n", add_special_tokens=False)["input_ids"]
            response = tokenizer(row[name], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            longest = max(len(tokenizer(row[n], add_special_tokens=False)["input_ids"]) + 1 for n in names)
            prompt = prompt[-max(max_length - longest, 1) :]
            encoded.append(EncodedResponse((prompt + response)[:max_length], len(prompt)))
    return encoded


def states(lm: Any, batch: SequenceBatch) -> Tensor:
    hidden: Tensor = lm.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return hidden


def token_logprobs(lm: Any, batch: SequenceBatch) -> Tensor:
    """Log-probs of all response tokens, one after the other."""
    rows, columns = batch.response_mask.nonzero(as_tuple=True)
    logits = lm.lm_head(states(lm, batch)[rows, columns - 1])
    return -F.cross_entropy(logits, batch.input_ids[rows, columns], reduction="none")


def summed(logprobs: Tensor, batch: SequenceBatch) -> Tensor:
    """Sums of log-probs over each response."""
    return torch.stack([part.sum() for part in logprobs.split(batch.response_mask.sum(dim=1).tolist())])


@torch.no_grad()
def summed_logprobs(lm: Any, batch: SequenceBatch) -> Tensor:
    return summed(token_logprobs(lm, batch), batch)


if __name__ == "__main__":
    main()
