"""SmolLM2-135M-Instruct from SFT to GRPO with LoRA, on a CPU: the run of docs/smollm2.md.

The script prepares the data and runs ``python train.py experiment=smollm2``. SFT, the reward model and DPO learn from
preferences between the responses of other models. GRPO then learns to respond in at most twelve words, which a function
verifies. The reward model, which GRPO does not see, scores its responses in the evaluation.

    python benchmarks/smollm2.py --model <folder> --pairs <file.jsonl> [--pairs <file.jsonl>] [<override> ...]

The files hold preference pairs, ``{"prompt": ..., "chosen": ..., "rejected": ...}``, such as those of AlpacaEval. Every
fifth prompt is held out, with all of its pairs.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LIMIT = 12  # words
REQUEST = f" Use at most {LIMIT} words."


def follows_limit(prompts: list[str], responses: list[str]) -> list[float]:
    """Return 1 for a complete response of three to twelve words, and 0 for all others."""
    return [float(3 <= len(text.split()) <= LIMIT and text.strip()[-1:] in tuple(".!?")) for text in responses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct, or its hub id")
    parser.add_argument("--pairs", required=True, type=Path, action="append", help="preference pairs")
    parser.add_argument("--data", default=Path("outputs/smollm2-data"), type=Path, help="directory of prepared data")
    parser.add_argument("overrides", nargs="*", help="overrides of train.py, such as resume=true")
    options = parser.parse_args()
    prepare(options.pairs, options.data)
    command = [
        "train.py",
        "experiment=smollm2",
        f"model.path={options.model}",
        f"smollm2={options.data}",
        *options.overrides,
    ]
    subprocess.run([sys.executable, *command], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    sys.stdout.write(f"Peak memory of the whole run: {peak:.1f} GiB\n")


def prepare(files: list[Path], directory: Path, longest_prompt: int = 250, longest_response: int = 500) -> None:
    """Write the files that ``conf/experiment/smollm2.yaml`` reads. Texts are limited to this many characters."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if len(row["prompt"]) <= longest_prompt]
    held_out = set(sorted({row["prompt"] for row in rows})[::5])
    for suffix, split in {
        "": [row for row in rows if row["prompt"] not in held_out],
        "_test": [row for row in rows if row["prompt"] in held_out],
    }.items():
        pairs = [row for row in split if max(len(row["chosen"]), len(row["rejected"])) <= longest_response]
        chosen = sorted({(row["prompt"], row["chosen"]) for row in pairs})
        write(directory / f"pairs{suffix}.jsonl", pairs)
        write(directory / f"demonstrations{suffix}.jsonl", ({"prompt": p, "completion": c} for p, c in chosen))
        prompts = sorted({row["prompt"] for row in split})
        write(directory / f"prompts{suffix}.jsonl", ({"prompt": prompt + REQUEST} for prompt in prompts))


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
