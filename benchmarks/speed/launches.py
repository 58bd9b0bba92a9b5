"""Counts operations and host reads, per decoded token and per optimizer step, on the emulated device of the tests.

    python benchmarks/speed/launches.py

An operation that is not a view starts a kernel on an accelerator. A read makes the host wait for the device.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM as Auto
from transformers import GPT2Config, LlamaConfig, Mamba2Config, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from accelerator.device import DEVICE, emulated_device
from accelerator.reads import recorded_reads
from accelerator.runs import DeviceRuns
from rlhf.models import Transformer, train_tokenizer
from rlhf.sampling import LocalSampler, SamplingParams
from rlhf.speed import speed

LAYERS = 4
PLAIN = {"fused_logprobs": False, "shared_prompts": False, "lean_decoding": False}
TEXTS = ["Who won the race on Monday?", "The mayor opened the bridge."] * 50


class Operations(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        infos = [returned.alias_info for returned in func._schema.returns]
        self.count += not any(info is not None and not info.is_write for info in infos)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Callable[[], tuple[int, int]]]:
    """Yield a function that returns the numbers of operations and of reads so far."""
    with recorded_reads() as reads, Operations() as operations:
        yield lambda: (operations.count, len([read for read in reads if not read.is_logging]))


def decoding(lm: PreTrainedModel, tokenizer: Any, *, with_generate: bool) -> list[float]:
    """Return operations and reads per decoding step of 8 responses."""
    prompts = [list(range(10, 14 + i)) for i in range(8)]
    totals = []
    for tokens in (16, 48):
        with counted() as count, torch.no_grad():
            if with_generate:
                ids = torch.tensor([[5] * (11 - len(prompt)) + prompt for prompt in prompts], device=DEVICE)
                keys = {
                    "max_new_tokens": tokens,
                    "do_sample": True,
                    "top_k": 0,
                    "eos_token_id": None,
                    "pad_token_id": 5,
                }
                lm.generate(ids, attention_mask=(ids != 5).long(), **keys)
            else:
                sampler = LocalSampler()
                sampler.sync(lm, tokenizer)
                sampler.sample(prompts, SamplingParams(max_new_tokens=tokens, temperature=1.0, stop_tokens=["<pad>"]))
            totals.append(count())
    return [(more - less) / 32 for less, more in zip(*totals, strict=True)]


class StepCounts(lightning.Callback):
    """Counts each training step, from its batch to the end of the optimizer step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.counting = counted()
        self.count = self.counting.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(self.count())
        self.counting.__exit__(None, None, None)


def training(kind: str, tokenizer: Any, lm: PreTrainedModel) -> tuple[int, int]:
    """Return operations and reads of the last optimizer step of a run of two or more."""
    with tempfile.TemporaryDirectory() as folder:
        counts = StepCounts()
        run = DeviceRuns(Path(folder), tokenizer, lm).run(kind, callbacks=[counts], trainer={"gradient_clip_val": 1.0})
        run.trainer.callbacks.remove(run.recorder)
        run.fit()
        return counts.steps[-1]


def main() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    size = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    configs = {
        "Llama": LlamaConfig(
            **size, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4
        ),
        "GPT-2": GPT2Config(**size, n_positions=128, n_embd=32, n_layer=LAYERS, n_head=4),
        "Mamba-2": Mamba2Config(
            **size, hidden_size=32, num_hidden_layers=LAYERS, num_heads=4, head_dim=16, state_size=8, n_groups=1
        ),
    }
    write = sys.stdout.write
    with emulated_device():
        write(f"| per decoded token, {LAYERS} layers | operations | waits of the host |\n|---|---|---|\n")
        for name, config in configs.items():
            lm = Auto.from_config(config).eval().to(DEVICE)
            for side, lean in (("ours", True), ("speed.lean_decoding=false", False), ("generate", False)):
                with speed(lean_decoding=lean):
                    operations, reads = decoding(lm, tokenizer, with_generate=side == "generate")
                write(f"| {name}, {side} | {operations:.0f} | {reads:.2f} |\n")
        write("\n| per optimizer step, 2 layers | operations | waits of the host |\n|---|---|---|\n")
        source = Transformer(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_length=128)
        for kind in ("sft", "reward", "dpo", "ppo", "grpo"):
            for side, settings in (("ours", {}), ("switches off", PLAIN)):
                with speed(**settings):  # type: ignore[arg-type]
                    operations, reads = training(kind, tokenizer, source.language_model(tokenizer))
                write(f"| {kind}, {side} | {operations} | {reads} |\n")


if __name__ == "__main__":
    main()
