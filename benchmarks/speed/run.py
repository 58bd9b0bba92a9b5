"""Measures the speed of this project compared with TRL and with a careful loop in plain PyTorch, on the CPU.

    python benchmarks/speed/run.py --demonstrations FILE --pairs FILE --solutions FILE --make-trl DIR

Every measurement is a fresh process. The sides take turns, and the table shows medians and medians of the ratios of
each turn. README.md explains the method.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
TRL_PACKAGES = ("torch==2.13.0", "transformers==5.24.0", "trl==1.16.0")
PPO_PACKAGES = (*TRL_PACKAGES[:2], "trl==1.12.0")  # the last version whose PPO trainer has a separate value model
BUSY = 0.05  # share of the processors that other processes may take


@dataclass(frozen=True)
class Cell:
    """One line of the table.

    Args:
        stage: What ``bare.py`` and ``trl_side.py`` train.
        data: File in the work directory.
        unit: ``tokens_per_s`` or ``sequences_per_s``.
        batch_size: Rows per step, for each size of the model.
        steps: Optimizer steps, or iterations of PPO, for each size of the model.
        overrides: Overrides of our command.
        model: Name of the language model in the work directory.
    """

    stage: str
    data: str
    unit: str
    batch_size: dict[str, int]
    steps: dict[str, int]
    overrides: tuple[str, ...] = field(default=())
    model: str = "lm"


PAIRS, LONG = "pairs.jsonl", "long_prompts.jsonl"
# Only so many rows, because the log-probs of all of them are computed first.
BEFORE = ("stage.precompute_ref_logprobs=true", "data.max_rows=200")
LIVE = ("stage.precompute_ref_logprobs=false",)
FEW = {"T": 10, "S": 5}
# Iterations of 32 responses to prompts of at most 64 tokens, with four passes of four minibatches.
PPO = (
    *("stage.sampling.max_new_tokens=64", "data.max_length=128", "stage.minibatch_size=8"),
    *("stage.ppo_epochs=4", "data.max_rows=2000"),
)
TRAINED = ("stage.sampling.max_new_tokens=192", "data.max_length=384", *PPO[2:])
TRAINED_STEPS = 200  # of the SFT that teaches the model ``trained`` to end its responses
CELLS = {
    "sft": Cell("sft", "demonstrations.jsonl", "tokens_per_s", {"T": 16, "S": 8}, {"T": 22, "S": 6}),
    "mamba": Cell("sft", "demonstrations.jsonl", "tokens_per_s", {"T": 16, "S": 8}, FEW, model="mamba"),
    "reward-pairs": Cell("reward", PAIRS, "sequences_per_s", {"T": 8, "S": 4}, FEW),
    "reward-long-prompts": Cell("reward", LONG, "sequences_per_s", {"T": 8, "S": 4}, FEW),
    "dpo-pairs": Cell("dpo", PAIRS, "sequences_per_s", {"T": 8, "S": 4}, FEW, BEFORE),
    "dpo-pairs-live": Cell("dpo_live", PAIRS, "sequences_per_s", {"T": 8, "S": 4}, FEW, LIVE),
    "dpo-long-prompts": Cell("dpo", LONG, "sequences_per_s", {"T": 8, "S": 4}, FEW, BEFORE),
    "ppo": Cell("ppo", "demonstrations.jsonl", "sequences_per_s", {"T": 32, "S": 32}, {"T": 6, "S": 3}, PPO),
    "ppo-trained": Cell(
        *("ppo", "demonstrations.jsonl", "sequences_per_s", {"T": 32, "S": 32}, {"T": 5, "S": 3}, TRAINED, "trained"),
    ),
    "ppo-shared-critic": Cell(
        *("ppo", "demonstrations.jsonl", "sequences_per_s", {"T": 32, "S": 32}, {"T": 6, "S": 3}),
        (*PPO, "stage.critic=shared"),
    ),
    "dpo-long-prompts-live": Cell("dpo_live", LONG, "sequences_per_s", {"T": 8, "S": 4}, FEW, LIVE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demonstrations", type=Path, required=True, help="JSON Lines with document and target")
    parser.add_argument("--pairs", type=Path, required=True, help="JSON Lines with prompt, chosen and rejected")
    parser.add_argument("--solutions", type=Path, required=True, help="pairs about the documents of --demonstrations")
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL 1.16")
    parser.add_argument("--ppo-python", help="interpreter of an environment with TRL 1.12, for PPO")
    parser.add_argument("--make-trl", type=Path, help="make these environments in this directory")
    parser.add_argument("--work", type=Path, help="directory that is kept; default: a temporary one")
    parser.add_argument("--only", nargs="*", default=list(CELLS), choices=CELLS)
    parser.add_argument("--sizes", nargs="*", default=["T"], choices=["T", "S"])
    parser.add_argument("--sides", nargs="*", default=["ours", "trl", "trl-own", "bare"])
    parser.add_argument(
        "--variant",
        nargs="*",
        default=[],
        help="further sides: name:override,override, such as bf16:trainer.precision=..",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.make_trl:
        options.trl_python = make_environment(options.make_trl / "trl", TRL_PACKAGES)
        options.ppo_python = make_environment(options.make_trl / "ppo", PPO_PACKAGES)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        from inputs import make  # imported here, because --help should not load torch

        rates = subprocess.run(
            [sys.executable, str(HERE / "flops.py")],
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        sys.stdout.write(f"peak rate of matrix products in operations per second: {rates.stdout}")
        options.peak = json.loads(rates.stdout)["float32"]
        make(work, options.demonstrations, options.pairs, options.solutions, options.sizes)
        for size in options.sizes:
            for name in options.only:
                if CELLS[name].model == "trained":
                    make_trained(size, work, options)
                sys.stdout.write(
                    table(f"{name} {size}", CELLS[name].unit, measure(CELLS[name], size, work, options), options.peak)
                )
                sys.stdout.flush()


def make_environment(directory: Path, packages: tuple[str, ...]) -> str:
    """Make an environment unless it exists, and return its interpreter."""
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return str(python)


def make_trained(size: str, work: Path, options: Any) -> None:
    """Train a model that ends its responses like the demonstrations do, unless it exists."""
    path = work / size / "trained"
    if path.exists():
        return
    cell = Cell("sft", "demonstrations.jsonl", "", {size: 16}, {size: TRAINED_STEPS})
    keys = ["save_hf=true", "stage.learning_rate=1e-3"]
    start(ours(cell, size, work, work / "result.json", keys), options)
    shutil.move(next((work / "outputs").glob("*/sft/hf")), path)


def measure(cell: Cell, size: str, work: Path, options: Any) -> dict[str, list[dict[str, float]]]:
    """Run all sides in turn, and return the results of each side."""
    variants = dict(variant.split(":", 1) for variant in options.variant)
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    rows = work / "rows.json"
    for repeat in range(options.repeats):
        for side in [*(side for side in options.sides if cell.stage != "ppo" or side in ("ours", "trl")), *variants]:
            path = work / "result.json"
            path.unlink(missing_ok=True)
            started = time.time()
            if side == "ours" or side in variants:
                overrides = variants[side].split(",") if side in variants else []
                start(ours(cell, size, work, path, overrides), options)
            else:
                start(theirs(side, cell, size, work, path, rows, options), options)
            result = json.loads(path.read_text())
            results[side].append({**result, "start": result["first_step"] - started})
            if side == "ours" and repeat == 0:
                shutil.copy(path, rows)
    return results


def ours(cell: Cell, size: str, work: Path, path: Path, overrides: list[str]) -> list[str]:
    """Return the command of a real run."""
    output = work / "outputs"
    optimizer_steps = cell.steps[size] * (16 if cell.stage == "ppo" else 1)
    shutil.rmtree(output, ignore_errors=True)
    return [
        *(sys.executable, str(HERE.parents[1] / "train.py"), f"stage={cell.stage.split('_')[0]}", "trainer=cpu"),
        *("model=pretrained", f"model.path={work / size / cell.model}", "data=jsonl", "data.val_fraction=0"),
        *(
            f"data.train={work / cell.data}",
            f"data.cache_dir={work / 'cache'}",
            "data.max_length=512",
            'data.template="{prompt}\\n"',
            "data.seed=1",
        ),
        *(f"data.batch_size={cell.batch_size[size]}", f"trainer.max_steps={optimizer_steps}"),
        *(f"paths.root={output}", "callbacks.checkpoint=null", "+callbacks.speed._target_=ours.RecordSteps"),
        f"+callbacks.speed.path={path}",
        *(["stage.samples=0"] if not cell.stage.startswith("reward") else ["data.demonstrations=null"]),
        *(
            [f"stage.policy={work / size / cell.model}", f"stage.reward_model={work / size / 'reward'}"]
            * (cell.stage == "ppo")
        ),
        *cell.overrides,
        *overrides,
    ]


def theirs(side: str, cell: Cell, size: str, work: Path, path: Path, rows: Path, options: Any) -> list[str]:
    """Return the command of another side."""
    model = work / size / ("reward" if cell.stage == "reward" and side != "bare" else cell.model)
    python, script = (sys.executable, "bare.py") if side == "bare" else (options.trl_python, "trl_side.py")
    if cell.stage == "ppo":
        python, script = options.ppo_python, "trl_ppo.py"
    if python is None:
        sys.exit(f"The side {side} needs --trl-python and --ppo-python, or --make-trl.")
    order = [] if side.startswith("trl-own") or cell.stage == "ppo" else ["--rows", str(rows)]
    bf16 = ["--bf16"] if side.endswith("-bf16") else []
    counts = ["--batch-size", str(cell.batch_size[size]), "--steps", str(cell.steps[size])]
    counts += ["--response", cell.overrides[0].split("=")[1]] if cell.stage == "ppo" else []
    return [
        python,
        str(HERE / script),
        cell.stage,
        str(model),
        str(work / cell.data),
        str(path),
        *order,
        *counts,
        *bf16,
    ]


def start(command: list[str], options: Any) -> None:
    """Run a command without output, and stop with its output if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    if command[0] in (options.trl_python, options.ppo_python):
        environment["PYTHONPATH"] = str(HERE)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def table(title: str, unit: str, results: dict[str, list[dict[str, float]]], peak: float) -> str:
    """Return the lines of a cell: one per side."""
    lines = [
        f"\n| {title}, {unit} | median | ours / this | MFU | computed / real tokens | first step, s | faults per step "
        "| peak MiB | others | n |",
        "|---" * 10 + "|",
    ]
    for side, runs in results.items():
        speeds = [run[unit] for run in runs]
        ratio = median(our[unit] / run[unit] for our, run in zip(results["ours"], runs, strict=True))
        others = max(run["others"] for run in runs)
        warning = " (busy)" if others > BUSY else ""
        computed = median(run["computed_per_token"] for run in runs)
        rate = median(run.get("flops_per_s", 0.0) for run in runs) / peak
        lines.append(
            f"| {side} | {median(speeds):.4g} | {ratio:.2f} | {f'{rate:.0%}' if rate else ''} "
            f"| {f'{computed:.2f}' if computed else ''} | {median(run['start'] for run in runs):.1f} "
            f"| {median(run['faults_per_step'] for run in runs):.3g} | {median(run['peak'] for run in runs):.0f} "
            f"| {others:.2f}{warning} | {len(runs)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
