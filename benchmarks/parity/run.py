"""Compare this project with TRL, step by step: one table.

    python benchmarks/parity/run.py --trl-python trl/bin/python --trl-ppo-python trl-ppo/bin/python

Start it in this project's environment. The first interpreter has TRL 1.16, the second TRL 1.12; README.md says how to
make them. About 5 minutes on 2 CPU cores. Without one of the two, its part is left out. Exit code 1 if
anything differs that has no known reason.
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
    parser.add_argument("--work", type=Path, help="folder for models and numbers, kept; without it, a temporary one")
    parser.add_argument("--only", nargs="*", help="names of cases and iterations; without it, all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        rows = measure(work, options.trl_python, options.trl_ppo_python, options.only or [])
    sys.stdout.write(table(rows) + "\n")
    if any(row.verdict == "differ, unexplained" for row in rows):
        sys.exit(1)


def measure(work: Path, trl: str | None, trl_ppo: str | None, only: list[str]) -> list[Row]:
    """Run both sides; the rows of the table."""
    from inputs import make  # the other side reads cases and compare only, and has no rlhf

    work.mkdir(parents=True, exist_ok=True)
    make(work)
    wanted = ["--only", *only] if only else []
    start(sys.executable, "ours.py", work, wanted)
    rows = []
    if trl:
        start(trl, "trl_curves.py", work, wanted)
        for case in CASES:
            if not only or case.name in only:
                rows += compare_curves(
                    case, read(work / "ours" / f"{case.name}.json"), read(work / "trl" / f"{case.name}.json")
                )
    if trl_ppo:
        start(trl_ppo, "trl_ppo.py", work, wanted)
        for setting in ITERATIONS:
            if not only or setting.name in only:
                name = f"ppo-{setting.name}"
                files = (work / "ours" / name, work / "trl" / name, work / "trl" / f"{name}-population")
                rows += compare_iteration(setting, *(read(file.with_suffix(".json")) for file in files))
    return rows


def start(python: str, script: str, work: Path, wanted: list[str]) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if python == sys.executable:
        environment["PYTHONPATH"] = str(HERE.parents[1])
    command = [python, str(HERE / script), str(work), *wanted]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)  # the table stands alone on stdout


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
