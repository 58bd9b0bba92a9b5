"""Compares this project with TRL step by step and prints one table.

    python benchmarks/parity/run.py --trl-python trl/bin/python --trl-ppo-python trl-ppo/bin/python

Start it in this project's environment. The first interpreter has TRL 1.16, the second TRL 1.12; README.md explains how
to create them. Without one of the two, its part is left out. The run takes about 5 minutes on 2 CPU cores. If anything
differs without a known reason, the exit code is 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cases import CASES, ITERATIONS
from compare import Row, compare_curves, table
from compare_ppo import compare_iteration

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="interpreter of the environment with TRL 1.16")
    parser.add_argument("--trl-ppo-python", help="interpreter of the environment with TRL 1.12")
    parser.add_argument(
        "--work", type=Path, help="directory for models and results, which is kept; default: a temporary one"
    )
    parser.add_argument("--only", nargs="*", help="names of cases and iterations; default: all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        rows = measure(work, options.trl_python, options.trl_ppo_python, options.only or [])
    sys.stdout.write(table(rows) + "\n")
    if any(row.outcome == "differ, unexplained" for row in rows):
        sys.exit(1)


def measure(work: Path, trl: str | None, trl_ppo: str | None, only: list[str]) -> list[Row]:
    """Run both sides and return the rows of the table."""
    from inputs import make  # imported here, because --help should not load torch

    work.mkdir(parents=True, exist_ok=True)
    make(work)
    selection = ["--only", *only] if only else []
    start(sys.executable, "ours.py", work, selection)
    rows = []
    if trl:
        start(trl, "trl_curves.py", work, selection)
        for case in CASES:
            if not only or case.name in only:
                rows += compare_curves(
                    case, read(work / "ours" / f"{case.name}.json"), read(work / "trl" / f"{case.name}.json")
                )
    if trl_ppo:
        start(trl_ppo, "trl_ppo.py", work, selection)
        for setting in ITERATIONS:
            if not only or setting.name in only:
                name = f"ppo-{setting.name}"
                files = (work / "ours" / name, work / "trl" / name, work / "trl" / f"{name}-population")
                rows += compare_iteration(setting, *(read(file.with_suffix(".json")) for file in files))
    return rows


def start(python: str, script: str, work: Path, selection: list[str]) -> None:
    """Run one of the scripts of this directory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if python == sys.executable:
        environment["PYTHONPATH"] = str(HERE.parents[1])
    command = [python, str(HERE / script), str(work), *selection]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)  # only the table goes to stdout


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
