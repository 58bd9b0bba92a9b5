"""Measures reading and encoding of many rows: seconds and peak memory of a first and a second start, in new processes.

python benchmarks/speed/data_at_scale.py --text demonstrations.jsonl --rows 1000000 --work <directory>
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from inputs import read


def write_rows(text: Path, count: int, path: Path) -> None:
    """Write rows whose texts are those of ``text`` with other numbers, so that no two rows are the same."""
    rows = read(text)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = rows[i % len(rows)]
            document = f"{row['document']} Problem {i}, seed {i * 7919 % 104729}."
            file.write(json.dumps({"document": document, "target": row["target"]}) + "\n")


def start(path: str, cache: str, model: str) -> None:
    """Read and encode the rows as ``stage=sft`` does, and load one epoch's order of batches."""
    started = time.perf_counter()
    from transformers import AutoTokenizer

    from rlhf.sft import SFTDataModule

    imported = time.perf_counter()
    data = SFTDataModule(train=path, cache_dir=cache, tokenizer=AutoTokenizer.from_pretrained(model))
    data.setup("fit")
    loader = data.train_dataloader()
    next(iter(loader))
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    sys.stdout.write(
        json.dumps({"rows": len(loader.rows), "seconds": seconds, "imports": imported - started, "GiB": memory})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="JSON Lines with document and target")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, help="directory of the rows and the cache")
    parser.add_argument("--model", help="directory with a tokenizer")
    parser.add_argument("--start", nargs=3, metavar=("ROWS", "CACHE", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        start(*arguments.start)
        return
    path = arguments.work / f"{arguments.rows}_rows.jsonl"
    write_rows(arguments.text, arguments.rows, path)
    sys.stdout.write(f"{path}: {path.stat().st_size / 1e6:.0f} MB\n")
    for name in ("first start", "second start"):
        keys = [str(path), str(arguments.work / "cache"), arguments.model]
        result = subprocess.run(
            [sys.executable, __file__, "--start", *keys], check=True, stdout=subprocess.PIPE, text=True
        )
        sys.stdout.write(f"{name}: {result.stdout.strip()}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
