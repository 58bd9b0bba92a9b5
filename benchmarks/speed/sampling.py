"""Measures sampling: ``LocalSampler`` compared with ``generate`` of transformers, in turns, in one process.

    python benchmarks/speed/sampling.py WORK/T/lm --rows 1 32 128 --lengths FILE

With ``--lengths``, responses end where the targets of these demonstrations do, and there are four times as many prompts
as rows: ``generate`` computes one batch after the other, and the sampler gives free places to the next prompts.
"""

import argparse
import copy
import json
import os
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

import rlhf.sampling.sampler as sampler_module
from rlhf.models import limit_scan_chunks
from rlhf.process.heap import keep_heap
from rlhf.sampling import LocalSampler, SamplingParams
from rlhf.sampling.decoding import Decoding
from rlhf.speed import speed


class EndAt(LogitsProcessor):
    """Forces EOS where each response ends."""

    def __init__(self, lengths: list[int], prompt: int, eos: int) -> None:
        self.lengths, self.prompt, self.eos = torch.tensor(lengths), prompt, eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ends = self.lengths <= input_ids.shape[1] - self.prompt + 1
        scores[:, self.eos] = torch.where(ends, 1e4, -1e4)
        return scores


def ending_at(lengths: list[int], eos: int) -> type[Decoding]:
    """Return a ``Decoding`` whose responses end where they should."""
    ends = torch.tensor(lengths)

    class EndingAt(Decoding):
        def _draw(self, rows: Any, logits: Tensor) -> None:
            over = ends[self.prompt[rows]] <= self.drawn_count[rows] + 1
            logits[:, eos] = torch.where(over, 1e4, -1e4)
            super()._draw(rows, logits)

    return EndingAt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 32, 128])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--lengths", type=Path, help="demonstrations whose targets have the lengths of the responses")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    keep_heap()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    lm: Any = AutoModelForCausalLM.from_pretrained(options.model).eval()
    ours = copy.deepcopy(lm)
    limit_scan_chunks(ours)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    sys.stdout.write("| rows | side | tokens/s | ours / this |\n|---|---|---|---|\n")
    for rows in options.rows:
        measure(lm, ours, tokenizer, rows, options)


def measure(lm: Any, ours: Any, tokenizer: Any, rows: int, options: Any) -> None:
    """Measure both sides in turns, and print a line for each."""
    numbers = random.Random(0)
    count, lengths = rows, [options.new_tokens] * rows
    if options.lengths:
        count = 4 * rows
        texts = [json.loads(line)["target"] for line in options.lengths.open(encoding="utf-8", newline="\n")]
        found = [len(tokenizer(text)["input_ids"]) for text in numbers.sample(texts, count)]
        lengths = [min(length, options.new_tokens) for length in found]
    vocabulary = range(10, len(tokenizer.get_vocab()))
    prompts = [numbers.choices(vocabulary, k=numbers.randrange(40, 65)) for _ in range(count)]
    sides = {
        "ours": lambda: sample(ours, tokenizer, prompts, lengths, rows),
        "ours, cache of transformers": lambda: sample(ours, tokenizer, prompts, lengths, rows, lean=False),
        "generate": lambda: generate(lm, tokenizer, prompts, lengths, rows),
    }
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(options.repeats + 1):
        for side, run in sides.items():
            started = time.perf_counter()
            run()
            if repeat:  # The first round warms up.
                speeds[side].append(sum(lengths) / (time.perf_counter() - started))
    for side, values in speeds.items():
        ratio = median(ours / this for ours, this in zip(speeds["ours"], values, strict=True))
        sys.stdout.write(f"| {rows} | {side} | {median(values):.0f} | {ratio:.2f} |\n")
        sys.stdout.flush()


def sample(lm: Any, tokenizer: Any, prompts: Any, lengths: list[int], rows: int, *, lean: bool = True) -> None:
    """Sample with our sampler."""
    sampler_module.Decoding = ending_at(lengths, tokenizer.eos_token_id)  # type: ignore[misc]
    sampler = LocalSampler(batch_size=rows)
    sampler.sync(lm, tokenizer)
    with speed(lean_decoding=lean):
        if lean:
            found = sampler.sample(
                prompts, SamplingParams(max_new_tokens=max(lengths), temperature=1.0)
            ).lengths.tolist()
        else:
            found = []
            for start in range(0, len(prompts), rows):
                part = lengths[start : start + rows]
                sampler_module.Decoding = ending_at(part, tokenizer.eos_token_id)  # type: ignore[misc]
                params = SamplingParams(max_new_tokens=max(part), temperature=1.0)
                found += sampler.sample(prompts[start : start + rows], params).lengths.tolist()
    assert found == lengths


@torch.no_grad()
def generate(lm: Any, tokenizer: Any, prompts: list[list[int]], lengths: list[int], rows: int) -> None:
    """Sample with ``generate``, one batch after the other."""
    for start in range(0, len(prompts), rows):
        batch = prompts[start : start + rows]
        width = max(map(len, batch))
        input_ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        ends = EndAt(lengths[start : start + rows], width, tokenizer.eos_token_id)
        lm.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=max(lengths[start : start + rows]),
            do_sample=True,
            top_k=0,
            temperature=1.0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=[ends],
        )


if __name__ == "__main__":
    main()
