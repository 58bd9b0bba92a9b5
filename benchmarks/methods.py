"""Makes the table of methods: gold win rate over SFT with 95 % bootstrap intervals, one column per seed.

python train.py -m experiment=compare seed=1,2,3       about 25 minutes per seed on one CPU core
python benchmarks/methods.py outputs/rlhf/sweeps/pipeline/seed=* --plot methods.svg
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs, one per seed")
    parser.add_argument("--plot", type=Path, help="also write a chart of the win rates to this file")
    options = parser.parse_args()
    runs = options.runs
    models = [json.loads((run / "evaluation" / "metrics.json").read_text())["models"] for run in runs]
    lines = [
        f"| method | {' | '.join(run.name for run in runs)} | mean | KL to SFT, nats per response | tokens |",
        f"|{'---|' * (len(runs) + 4)}",
    ]
    for method in [name for name in models[0] if "win_rate_vs_sft" in models[0][name]]:
        metrics = [of_run[method] for of_run in models]
        rates = [of_seed["win_rate_vs_sft"]["gold"] for of_seed in metrics]
        shown = " | ".join(f"{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]" for rate in rates)
        average = mean(rate["value"] for rate in rates)
        lines.append(
            f"| {method} | {shown} | {average:.3f} | {_mean(metrics, 'kl_to_sft')} | {_mean(metrics, 'length')} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    if options.plot:
        plot(models, options.plot)


def plot(models: list[dict[str, Any]], path: Path) -> None:
    """Draw the win rate of each method with its interval, one point per seed, the best method first."""
    import matplotlib.pyplot as plt

    rates = {
        method: [of_run[method]["win_rate_vs_sft"]["gold"] for of_run in models]
        for method in models[0]
        if "win_rate_vs_sft" in models[0][method] and method != "target"
    }
    methods = sorted(rates, key=lambda method: mean(rate["value"] for rate in rates[method]))
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(methods) + 0.8), layout="constrained")
    for row, method in enumerate(methods):
        for seed, rate in enumerate(rates[method]):
            value, height = rate["value"], row + 0.22 * (seed - (len(models) - 1) / 2)
            errors = [[value - rate["low"]], [rate["high"] - value]]
            axes.errorbar(value, height, xerr=errors, fmt="o", markersize=4, color=f"C{seed}", linewidth=1)
    axes.axvline(0.5, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xlabel("gold win rate over SFT, 95 % bootstrap interval; one color per seed")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)


def _mean(metrics: list[dict[str, Any]], name: str) -> str:
    """Return the mean over the seeds, or an empty cell for a metric that the data's own responses do not have."""
    return f"{mean(of_seed[name]['mean'] for of_seed in metrics):.2f}" if name in metrics[0] else ""


if __name__ == "__main__":
    main()
