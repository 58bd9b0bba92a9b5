"""Two rounds of DPO on the choices of a simulated annotator, who uses the preference page over HTTP.

    python benchmarks/rounds.py --seeds 1 2 3

For each seed: SFT on the bundled data, and two rounds of 600 prompts each, with two responses at temperature 1. The
annotator chooses the response with the higher gold score, and with a probability of 10 % the other one. Prints the gold
win rate over SFT after each round.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--prompts", type=int, default=600, help="prompts of each round")
    parser.add_argument("--noise", type=float, default=0.1, help="probability that the annotator is wrong")
    parser.add_argument("--port", type=int, default=8088)
    parser.add_argument("--root", type=Path, default=Path("outputs/rounds"), help="directory of the runs")
    parser.add_argument("overrides", nargs="*", help="further overrides of the pipeline")
    options = parser.parse_args()
    rows = [run(options, seed) for seed in options.seeds]
    sys.stdout.write(
        "| seed | pairs labeled | gold wins over SFT, round 1 | round 2 | KL to SFT, round 1 | round 2 |\n"
    )
    sys.stdout.write("|---|---|---|---|---|---|\n" + "".join(rows))


def run(options: argparse.Namespace, seed: int) -> str:
    """Run the pipeline and the annotator for one seed, and return a row of the table."""
    name = f"seed{seed}"
    sampling = f"'data.num_prompts={options.prompts}','stage.sampling.temperature=1'"
    page = f"[{sampling},'labels=page','labels.port={options.port}','labels.overlap=0']"
    pipeline = [
        *(sys.executable, "train.py", f"paths.root={options.root}", f"run={name}", f"seed={seed}"),
        *("pipeline.steps=[sft]", "pipeline.rounds=2", f"pipeline.overrides.collect={page}"),
        *("trainer=cpu", "trainer.enable_progress_bar=false", "overwrite=true", *options.overrides),
    ]
    annotator = [
        *(sys.executable, "benchmarks/simulated_annotator.py", "--url", f"http://127.0.0.1:{options.port}"),
        *("--noise", str(options.noise), "--seed", str(seed), "--patience", "3600"),
    ]
    process = subprocess.Popen(annotator, cwd=REPO)
    try:
        subprocess.run(pipeline, cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    finally:
        process.kill()
        process.wait()
    directory = REPO / options.root / name
    pairs = [labeled_pairs(directory / f"round_{number}" / "collect" / "candidates.jsonl") for number in (1, 2)]
    models = json.loads((directory / "round_2" / "evaluate" / "metrics.json").read_text())["models"]
    rounds = [models[f"round_{number}"] for number in (1, 2)]
    rates = [interval(model["win_rate_vs_sft"]["gold"]) for model in rounds]
    distances = [f"{model['kl_to_sft']['mean']:.2f}" for model in rounds]
    return f"| {seed} | {' + '.join(map(str, pairs))} | {' | '.join([*rates, *distances])} |\n"


def labeled_pairs(file: Path) -> int:
    """Return the number of prompts with two different responses: the annotator has labeled all of them."""
    rows = [json.loads(line)["responses"] for line in file.read_text().splitlines()]
    return sum(first["text"] != second["text"] for first, second in rows)


def interval(rate: dict[str, Any]) -> str:
    return f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"


if __name__ == "__main__":
    main()
