"""Over-optimisation of the reward model: gold and reward model score of PPO's checkpoints against their KL to SFT.

    python train.py stage=sft && python train.py stage=reward      unless the run has them already
    python benchmarks/overoptimization.py                          about 10 minutes on 2 CPU cores

PPO runs without a price of KL (``experiment=overoptimization``), every third iteration leaves a checkpoint, and
``stage=evaluate`` answers the held-out prompts with each. Needs matplotlib.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]
PICTURE = REPO / "docs" / "images" / "overoptimization.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="rlhf", help="a run that has SFT and reward model")
    parser.add_argument("--root", default="outputs", help="folder of the runs")
    options = parser.parse_args()
    typed = [f"run={options.run}", f"paths.root={options.root}"]
    folder = REPO / options.root / options.run / "overoptimization"
    train(["experiment=overoptimization", *typed])
    checkpoints = sorted(folder.glob("checkpoints/step*.ckpt"), key=lambda path: int(path.stem.removeprefix("step")))
    models = ", ".join(f"{path.stem}: '{path}'" for path in checkpoints)
    train(["stage=evaluate", *typed, f"stage.models={{sft: sft, {models}}}", f"paths.output={folder / 'evaluation'}"])
    measured = json.loads((folder / "evaluation" / "metrics.json").read_text())["models"]
    rows = [(name, metrics) for name, metrics in measured.items() if name != "target"]
    sys.stdout.write(
        "| checkpoint | KL to SFT, nats an answer | reward model score | gold score | tokens |\n|---|---|---|---|---|\n"
    )
    for name, metrics in rows:
        numbers = (metrics[key]["mean"] for key in ("kl_to_sft", "reward", "gold", "length"))
        sys.stdout.write(f"| {name} | {' | '.join(f'{number:.3f}' for number in numbers)} |\n")
    draw([metrics for _, metrics in rows])
    sys.stdout.write(f"{PICTURE}\n")


def train(overrides: list[str]) -> None:
    subprocess.run([sys.executable, "train.py", *overrides], cwd=REPO, check=True)


def draw(rows: list[dict]) -> None:
    """Both scores, each on its own axis, with their 95 % intervals."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    rows = sorted(rows, key=lambda metrics: metrics["kl_to_sft"]["mean"])
    distance = [metrics["kl_to_sft"]["mean"] for metrics in rows]
    figure, left = pyplot.subplots(figsize=(8, 4))
    for axis, name, label, colour in (
        (left, "gold", "gold score", "tab:orange"),
        (left.twinx(), "reward", "reward model score", "tab:blue"),
    ):
        middle = [metrics[name]["mean"] for metrics in rows]
        axis.plot(distance, middle, color=colour, marker="o", markersize=3)
        low, high = ([metrics[name][bound] for metrics in rows] for bound in ("low", "high"))
        axis.fill_between(distance, low, high, color=colour, alpha=0.2)
        axis.set_ylabel(label, color=colour)
    left.set_xscale("function", functions=(lambda kl: kl**0.5, lambda root: root**2))
    left.set_xticks([0, 1, 4, 9, 16, 25, 36, 49, 64, 81, 100, 121])
    left.set_xlim(0, max(distance) * 1.03)
    left.set_xlabel("KL to SFT, nats an answer; the axis is its square root, as in Gao et al. 2022 (arXiv:2210.10760)")
    left.set_title("PPO without a price of KL, 300 held-out prompts")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
