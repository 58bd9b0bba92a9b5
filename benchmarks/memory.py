"""Makes the table of memory: bytes per parameter and bytes per token of each stage and option.

    python benchmarks/memory.py                         about 15 minutes on 2 CPU cores

The peak of all tensors is counted exactly, operation by operation, in runs with short and with long sequences. The
slope over the tokens of a batch gives the bytes per token. The rest, divided by the parameters of the language model,
gives the bytes per parameter.
"""

import argparse
import json
import random
import sys
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rlhf.run import run_stage

REPO = Path(__file__).parents[1]
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 512, 1024, 8, 512
SEQUENCES = 8  # in each batch; a pair has two
LENGTHS = (128, 384)  # tokens of a sequence in the two runs
WORDS = [f"word{number}" for number in range(40)]  # So few that each of them becomes one token.
MODEL = [
    f"model.hidden_size={HIDDEN}",
    f"model.intermediate_size={INTERMEDIATE}",
    f"model.num_layers={LAYERS}",
    "model.num_heads=8",
    f"model.vocab_size={VOCABULARY}",
    "model.max_length=2048",
]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        name: What the row shows.
        overrides: Overrides of ``train.py``.
        predicted: Bytes per parameter of the language model, from the number of models and their precision. Gradients
            count only if activations are recomputed: otherwise, the peak is before the backward pass.
    """

    name: str
    overrides: tuple[str, ...]
    predicted: float


BF16, LORA, RECOMPUTE = "trainer.precision=bf16-mixed", "adapter=lora", "stage.gradient_checkpointing=true"
CASES = (
    Case("SFT", ("stage=sft",), 12),
    Case("SFT, bf16-mixed", ("stage=sft", BF16), 12),
    Case("SFT, gradient checkpointing", ("stage=sft", RECOMPUTE), 16),
    Case("SFT, LoRA", ("stage=sft", LORA), 4),
    Case("reward model", ("stage=reward",), 12),
    Case("DPO, precomputed log-probs", ("stage=dpo", "stage.precompute_ref_logprobs=true"), 12),
    Case("DPO, reference live", ("stage=dpo", "stage.precompute_ref_logprobs=false"), 16),
    Case("DPO, reference live, bf16-mixed", ("stage=dpo", "stage.precompute_ref_logprobs=false", BF16), 14),
    Case("DPO, LoRA, reference live", ("stage=dpo", "stage.precompute_ref_logprobs=false", LORA), 4),
    Case("GRPO", ("stage=grpo",), 20),
    Case("GRPO, LoRA", ("stage=grpo", LORA), 4),
    Case("PPO", ("stage=ppo",), 32),
    Case("PPO, bf16-mixed", ("stage=ppo", BF16), 28),
    Case("PPO, shared critic", ("stage=ppo", "stage.critic=shared"), 20),
    Case("PPO, LoRA", ("stage=ppo", LORA), 4),
)


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of all tensors that operations in this context use or make.

    Attributes:
        current: Bytes at present.
        peak: Largest value of ``current``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.current -= self._sizes.pop(key, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure the rows whose name contains this text")
    only = parser.parse_args().only
    write_row("", "bytes per parameter, predicted", "measured", "bytes per token, measured")
    write_row(*["---"] * 4)
    for case in CASES:
        if only in case.name:
            per_parameter, per_token = measure(case)
            write_row(case.name, f"{case.predicted:g}", f"{per_parameter:.1f}", f"{per_token:,.0f}")


def write_row(*cells: str) -> None:
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


def measure(case: Case) -> tuple[float, float]:
    """Return bytes per parameter and bytes per token."""
    with tempfile.TemporaryDirectory() as folder:
        peaks = [peak_of(case, Path(folder, str(length)), length) for length in LENGTHS]
    per_token = (peaks[1] - peaks[0]) / (SEQUENCES * (LENGTHS[1] - LENGTHS[0]))
    parameters = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE) + VOCABULARY * HIDDEN
    return (peaks[0] - per_token * SEQUENCES * LENGTHS[0]) / parameters, per_token


def peak_of(case: Case, folder: Path, length: int) -> int:
    """Return the peak of a run of the case, in bytes, in which each sequence has about ``length`` tokens."""
    folder.mkdir()
    write_records(folder, length)
    stage, adapter = case.overrides[0], [LORA] if LORA in case.overrides else []
    if stage != "stage=sft" or adapter:  # Only a trained model can be the base of an adapter.
        run(folder, length, "stage=sft", "trainer.max_steps=1")
    if stage in ("stage=grpo", "stage=ppo"):
        run(folder, length, "stage=reward", "trainer.max_steps=1", *adapter)
    base = [f"stage.policy={folder}/rlhf/sft/sft_final.pt", "run=adapted"] if stage == "stage=sft" and adapter else []
    with AllocationTracker() as tracker:
        run(folder, length, *case.overrides, *base, "trainer.max_steps=2")
    return tracker.peak


def write_records(folder: Path, length: int) -> None:
    """Write demonstrations and preference pairs of which half of the tokens belong to the prompt."""
    words = random.Random(0)

    def text() -> str:
        return " ".join(words.choice(WORDS) for _ in range(length // 2))

    pairs = [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(4 * SEQUENCES)]
    demonstrations = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    for name, records in {"pairs": pairs, "demonstrations": demonstrations}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def run(folder: Path, length: int, *overrides: str) -> None:
    """Run a stage on these records with ``SEQUENCES`` sequences in each batch."""
    stage = next(override for override in overrides if override.startswith("stage=")).split("=")[1]
    pairs = stage in ("reward", "dpo")
    shared = [
        *MODEL,
        f"paths.root={folder}",
        "trainer=cpu",
        "trainer.limit_val_batches=0",
        "callbacks.progress=null",
        "callbacks.checkpoint=null",
        "data=jsonl",
        f"data.train={folder / ('pairs' if pairs else 'demonstrations')}.jsonl",
        "data.template='{prompt}:'",
        "data.max_length=2048",
        f"data.batch_size={SEQUENCES // {'reward': 2, 'dpo': 2, 'grpo': 4}.get(stage, 1)}",
        f"data.eval_batch_size={SEQUENCES}",
    ]
    if stage in ("ppo", "grpo"):
        shared += [f"stage.minibatch_size={SEQUENCES}", f"stage.sampling.max_new_tokens={length // 2}"]
        shared += ["stage.rollout_batch_size=1", f"reward.batch_size={SEQUENCES}"]
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        cfg = compose("config", [*overrides, *shared])
    run_stage(cfg)


if __name__ == "__main__":
    main()
