"""Makes the table of LoRA: memory, time and file size of each stage with full fine-tuning and with adapters.

    python benchmarks/adapters.py --model <folder>              about 10 minutes for 135M parameters on one CPU core
    python benchmarks/adapters.py --model <folder> --repeats 3

Every row is measured in a separate process, and full fine-tuning and LoRA alternate. Memory is the peak of the resident
set until the end of training, with Python and all libraries. Time is the median over the steps of a run; a step of PPO
is an iteration with sampling. The first step is not counted.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
from hydra import compose, initialize_config_dir

REPO = Path(__file__).parents[1]
DATA = ["data.max_rows=16", "data.max_length=64", "data.batch_size=4", "data.eval_batch_size=4"]
STEPS = {"sft": 4, "reward": 1, "dpo": 4, "ppo": 8}  # optimizer steps; 2 are an iteration of PPO
STAGES = {
    "sft": ["stage.samples=0"],
    "reward": [],
    "dpo": ["stage.ref_logprobs_cache=null"],
    "ppo": ["stage.sampling.max_new_tokens=16", "stage.minibatch_size=4", "stage.ppo_epochs=2"],
}


class StepTimer(lightning.Callback):
    """Measures the seconds of each step, and the peak of memory until the end of training."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if getattr(batch, "last", True):
            self.ends.append(time.perf_counter())

    def on_train_end(self, trainer: Any, module: Any) -> None:
        seconds = [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        measured = {"seconds": statistics.median(seconds or [0.0]), "peak": peak / 2**20}
        sys.stdout.write(f"{json.dumps(measured)}\n")


def train(overrides: list[str]) -> None:
    """Train one stage with a timer. The last line of the output is its measurement."""
    from rlhf.run import run_stage

    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        run_stage(compose("config", overrides=[*overrides, "+callbacks.timer._target_=__main__.StepTimer"]))


def measure(stage: str, adapter: str, model: str, root: Path) -> dict[str, float]:
    """Run one stage in a new process, and return seconds per step, peak memory in GiB and file size in MB."""
    run = [f"run={adapter}", f"paths.root={root}", f"adapter={adapter}", "model=pretrained", f"model.path={model}"]
    flags = ["overwrite=true", "trainer=cpu", "trainer.enable_checkpointing=false", "trainer.limit_val_batches=0"]
    overrides = [f"stage={stage}", *run, *DATA, *STAGES[stage], *flags, f"trainer.max_steps={STEPS[stage]}"]
    command = [sys.executable, __file__, "--train", *overrides]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{stage} with adapter={adapter} failed:\n{done.stderr[-3000:]}")
    final = next((root / adapter / stage).glob("*_final.pt"))
    return {**json.loads(lines[-1]), "megabytes": final.stat().st_size / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a pretrained model")
    parser.add_argument("--repeats", type=int, default=1, help="number of runs of each row; the table has medians")
    parser.add_argument("--stages", nargs="+", default=["sft", "dpo", "ppo"], choices=STAGES)
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train)
        return
    if not arguments.model:
        parser.error("--model is required")
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "ppo" in arguments.stages:
            for adapter in ("none", "lora"):
                measure("reward", adapter, arguments.model, Path(folder))
        for _ in range(arguments.repeats):
            for stage in arguments.stages:
                for adapter in ("none", "lora"):
                    found = measure(stage, adapter, arguments.model, Path(folder))
                    results.setdefault((stage, adapter), []).append(found)
    sys.stdout.write("| stage | adapter | peak memory, GiB | seconds per step | file, MB |\n|---|---|---|---|---|\n")
    for (stage, adapter), runs in results.items():
        row = [statistics.median(run[name] for run in runs) for name in ("peak", "seconds", "megabytes")]
        sys.stdout.write(f"| {stage} | {adapter} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.0f} |\n")


if __name__ == "__main__":
    main()
