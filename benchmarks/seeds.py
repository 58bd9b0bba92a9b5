"""Makes the table of seeds: the demo pipeline for several seeds, with wall-clock time.

    python benchmarks/seeds.py --seeds 1 2 3            about 5 minutes per seed on 2 CPU cores
    python benchmarks/seeds.py --seeds 1 --model mamba

Each pipeline runs in a new process, one after the other.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--model", default="transformer")
    parser.add_argument("--root", default="outputs/benchmark", help="directory of the runs")
    options = parser.parse_args()
    rows = ["| seed | reward model accuracy | PPO wins over SFT | DPO wins over SFT | KL PPO / DPO | seconds |"]
    rows.append("|---|---|---|---|---|---|")
    for seed in options.seeds:
        run = f"{options.model}-seed{seed}"
        started = time.perf_counter()
        command = [f"seed={seed}", f"run={run}", f"model={options.model}", f"paths.root={options.root}"]
        subprocess.run([sys.executable, "train.py", *command], cwd=REPO, check=True)
        rows.append(f"| {seed} | {figures(REPO / options.root / run)} | {time.perf_counter() - started:.0f} |")
    sys.stdout.write("\n".join(rows) + "\n")


def figures(run: Path) -> str:
    """Return the results of one run as cells of the table."""
    models = json.loads((run / "evaluation" / "metrics.json").read_text())["models"]
    lines = (run / "reward" / "reward.log").read_text().splitlines()
    accuracy = next(line.split(" = ")[1] for line in reversed(lines) if "val/accuracy = " in line)
    rates = [models[name]["win_rate_vs_sft"]["gold"] for name in ("ppo", "dpo")]
    shown = [f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]" for rate in rates]
    kl = " / ".join(f"{models[name]['kl_to_sft']['mean']:.2f}" for name in ("ppo", "dpo"))
    return f"{float(accuracy):.3f} | {shown[0]} | {shown[1]} | {kl}"


if __name__ == "__main__":
    main()
