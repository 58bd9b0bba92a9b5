"""Reward model overoptimization: gold score and reward model score of PPO checkpoints against their KL to SFT.

    python train.py stage=sft && python train.py stage=reward      unless the run already has them
    python benchmarks/overoptimization.py                          about 10 minutes on 2 CPU cores

PPO runs without a KL penalty (``experiment=overoptimization``) and saves a checkpoint every third iteration.
``stage=evaluate`` then samples responses to the held-out prompts with each of them. Requires matplotlib.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]
FIGURE = REPO / "docs" / "images" / "overoptimization.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="rlhf", help="a run with an SFT model and a reward model")
    parser.add_argument("--root", default="outputs", help="directory of the runs")
    options = parser.parse_args()
    overrides = [f"run={options.run}", f"paths.root={options.root}"]
    directory = REPO / options.root / options.run / "overoptimization"
    train(["experiment=overoptimization", *overrides])
    checkpoints = sorted(directory.glob("checkpoints/step*.ckpt"), key=lambda path: int(path.stem.removeprefix("step")))
    models = ", ".join(f"{path.stem}: '{path}'" for path in checkpoints)
    output = directory / "evaluation"
    train(["stage=evaluate", *overrides, f"stage.models={{sft: sft, {models}}}", f"paths.output={output}"])
    measured = json.loads((output / "metrics.json").read_text())["models"]
    rows = [(name, metrics) for name, metrics in measured.items() if name != "target"]
    columns = ("checkpoint", "KL to SFT, nats per response", "reward model score", "gold score", "tokens")
    sys.stdout.write(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n")
    for name, metrics in rows:
        values = (metrics[key]["mean"] for key in ("kl_to_sft", "reward", "gold", "length"))
        sys.stdout.write(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |\n")
    draw([metrics for _, metrics in rows])
    sys.stdout.write(f"{FIGURE}\n")


def train(overrides: list[str]) -> None:
    subprocess.run([sys.executable, "train.py", *overrides], cwd=REPO, check=True)


def draw(rows: list[dict]) -> None:
    """Plot both scores on two axes, with their 95 % intervals."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    rows = sorted(rows, key=lambda metrics: metrics["kl_to_sft"]["mean"])
    distance = [metrics["kl_to_sft"]["mean"] for metrics in rows]
    figure, left = pyplot.subplots(figsize=(8, 4))
    for axis, name, label, color in (
        (left, "gold", "gold score", "tab:orange"),
        (left.twinx(), "reward", "reward model score", "tab:blue"),
    ):
        middle = [metrics[name]["mean"] for metrics in rows]
        axis.plot(distance, middle, color=color, marker="o", markersize=3)
        low, high = ([metrics[name][bound] for metrics in rows] for bound in ("low", "high"))
        axis.fill_between(distance, low, high, color=color, alpha=0.2)
        axis.set_ylabel(label, color=color)
    left.set_xscale("function", functions=(lambda kl: kl**0.5, lambda root: root**2))
    left.set_xticks([0, 1, 4, 9, 16, 25, 36, 49, 64, 81, 100, 121])
    left.set_xlim(0, max(distance) * 1.03)
    left.set_xlabel("KL to SFT, nats per response; square-root axis as in Gao et al. 2022 (arXiv:2210.10760)")
    left.set_title("PPO without a KL penalty, 300 held-out prompts")
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    main()
