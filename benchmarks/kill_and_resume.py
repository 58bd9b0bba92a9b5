"""Kills runs with ``kill -9`` at random moments, resumes them, and compares the weights with uninterrupted runs.

    python benchmarks/kill_and_resume.py                every stage, transformer and Mamba, and the pipeline
    python benchmarks/kill_and_resume.py --only ppo     the cases whose name contains this text

Every case is killed ten times: three times while it writes a checkpoint, and seven times at a moment that is drawn
uniformly from its training time. The runs use the default settings with less data, and write a checkpoint about every
0.6 seconds (``--interval``), so that runs of a few seconds have many. One run of the whole pipeline is killed ten times
in a row.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from rlhf.files import LAST, PART, PREVIOUS

REPO = Path(__file__).parents[1]
COMMON = [
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
    "data.eval_batch_size=16",
    "data.batch_size=8",
]
STAGES = {
    "sft": ["data.max_rows=200", "trainer.max_epochs=2"],
    "reward": ["data.max_rows=300"],
    "dpo": ["data.max_rows=160"],
    "ppo": ["data.max_rows=48", "stage.minibatch_size=4"],
    "grpo": ["data.max_rows=32", "stage.minibatch_size=8"],
}
MODELS = ("transformer", "mamba")
WHILE_WRITING = 3  # kills of each case that wait for a checkpoint to be written


@dataclass
class Outcome:
    """What happened to the killed runs of one case.

    Attributes:
        name: The case.
        kills: Number of kills.
        while_writing: Number of kills during which a checkpoint was being written.
        before_checkpoint: Number of kills before the first checkpoint; these runs start again.
        identical: Number of runs that ended with the weights of the uninterrupted run, bit for bit.
        lost: Seconds of work that each kill lost: the age of the newest checkpoint.
        leftovers: Files that an uninterrupted run does not leave.
    """

    name: str
    kills: int = 0
    while_writing: int = 0
    before_checkpoint: int = 0
    identical: int = 0
    lost: list[float] = field(default_factory=list)
    leftovers: set[str] = field(default_factory=set)

    def row(self) -> str:
        """Return the outcome as a row of the table."""
        cells = (
            self.name,
            self.kills,
            self.while_writing,
            self.before_checkpoint,
            self.identical,
            f"{max(self.lost, default=0.0):.1f}",
            ", ".join(sorted(self.leftovers)) or "none",
        )
        return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name contains this text")
    parser.add_argument("--kills", type=int, default=10, help="kills of each case")
    parser.add_argument("--jobs", type=int, default=2, help="cases to run at the same time, on one thread each")
    parser.add_argument("--interval", type=float, default=0.6, help="seconds of callbacks.checkpoint.every_n_minutes")
    parser.add_argument("--root", default=Path("outputs/kill"), type=Path, help="directory of the runs")
    parser.add_argument("--seed", type=int, default=1, help="seed of the moments")
    options = parser.parse_args()
    COMMON.append(f"callbacks.checkpoint.every_n_minutes={options.interval / 60}")
    root = options.root.resolve()
    names = [f"{stage}, {model}" for model in MODELS for stage in STAGES] + ["pipeline, transformer"]
    names = [name for name in names if options.only in name]
    for model in sorted({name.split(", ")[1] for name in names}):
        prepare(root, model)
    title = "killed | while writing | before the first checkpoint | identical | most work lost, s | leftover files"
    emit(f"| case | {title} |")
    emit("|---|---|---|---|---|---|---|")
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(torture, root, name, options.kills, random.Random(options.seed)) for name in names]
        outcomes = []
        for job in jobs:
            outcomes.append(job.result())
            emit(outcomes[-1].row())
    runs = sum(outcome.kills for outcome in outcomes if not outcome.name.startswith("pipeline"))
    identical = sum(outcome.identical for outcome in outcomes if not outcome.name.startswith("pipeline"))
    emit(f"{identical} of {runs} killed runs of one stage ended with the weights of the uninterrupted run.")


def prepare(root: Path, model: str) -> None:
    """Train the SFT model and the reward model that the stages start from."""
    for stage in ("sft", "reward"):
        if not list((root / f"inputs-{model}" / stage).glob("*_final.pt")):
            finish(command(root, f"inputs-{model}", model, [f"stage={stage}", *STAGES[stage]]))


def command(root: Path, run: str, model: str, overrides: list[str]) -> list[str]:
    return [sys.executable, "train.py", f"paths.root={root}", f"run={run}", f"model={model}", *COMMON, *overrides]


def torture(root: Path, name: str, kills: int, generator: random.Random) -> Outcome:
    """Kill and resume the runs of one case."""
    stage, model = name.split(", ")
    if stage == "pipeline":
        return torture_pipeline(root, model, kills, generator)
    inputs = root / f"inputs-{model}"
    overrides = [f"stage={stage}", *STAGES[stage]]
    if stage != "sft":
        overrides.append(f"stage.policy={inputs / 'sft' / 'sft_final.pt'}")
    if stage in {"ppo", "grpo"}:
        overrides.append(f"stage.reward_model={inputs / 'reward' / 'reward_model_final.pt'}")
    outcome = Outcome(name)
    expected = root / f"whole-{stage}-{model}" / stage
    seconds = finish(command(root, expected.parent.name, model, [*overrides, "overwrite=true"]), expected)
    while outcome.kills < kills:
        output = root / f"killed-{stage}-{model}-{outcome.kills}" / stage
        arguments = command(root, output.parent.name, model, overrides)
        while_writing = outcome.kills < WHILE_WRITING
        moment = generator.uniform(0, seconds / 2 if while_writing else seconds)
        if not start_and_kill([*arguments, "overwrite=true"], output, moment, while_writing, outcome):
            seconds *= 0.8  # The run ended before its moment: this machine has become faster.
            continue
        finish([*arguments, "resume=true"] if checkpoints(output) else arguments)
        outcome.identical += equal(output, expected)
        outcome.leftovers |= files(output) - files(expected) - {f"checkpoints/{PREVIOUS}"}
    return outcome


def torture_pipeline(root: Path, model: str, kills: int, generator: random.Random) -> Outcome:
    """Kill one run of the pipeline repeatedly, and continue it each time."""
    steps = [
        "pipeline.steps=[sft,reward,dpo,ppo,grpo,evaluate]",
        *(f"pipeline.overrides.{stage}={json.dumps(overrides)}" for stage, overrides in STAGES.items()),
        'pipeline.overrides.evaluate=["data.max_rows=16"]',
    ]
    outcome = Outcome(f"pipeline, {model}")
    start = time.monotonic()
    finish(command(root, "whole-pipeline", model, [*steps, "overwrite=true"]))
    seconds = time.monotonic() - start
    arguments = command(root, "killed-pipeline", model, steps)
    output = root / "killed-pipeline"
    mode = "overwrite=true"
    while outcome.kills < kills:
        moment = generator.uniform(0, seconds / kills)
        if not start_and_kill([*arguments, mode], output, moment, outcome.kills % 3 == 0, outcome):
            break
        mode = "resume=true"
    finish([*arguments, "resume=true"])
    outcome.identical = sum(equal(output / stage, root / "whole-pipeline" / stage) for stage in STAGES)
    outcome.leftovers = {name for name in files(output) if name.endswith(PART)}
    return outcome


def start_and_kill(arguments: list[str], output: Path, moment: float, while_writing: bool, outcome: Outcome) -> bool:
    """Start a command and kill it ``moment`` seconds after training has started.

    Args:
        arguments: The command.
        output: Directory of the run.
        moment: Seconds of training.
        while_writing: Wait for the next write of a checkpoint after that.
        outcome: Where to count the kill.

    Returns:
        Whether the command was still running then.
    """
    started = time.time()
    process = subprocess.Popen(
        arguments, cwd=REPO, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and training_start(output, started) is None:
        time.sleep(0.05)
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < moment:
        time.sleep(0.005)
    while process.poll() is None and while_writing and not list(output.rglob(f"*.ckpt{PART}")):
        time.sleep(0.0005)
    killed = process.poll() is None
    process.kill()
    process.wait()
    if not killed:
        return False
    end = time.time()
    outcome.kills += 1
    outcome.while_writing += bool(list(output.rglob(f"*.ckpt{PART}")))
    outcome.before_checkpoint += not checkpoints(output)
    saved = [path.stat().st_mtime for path in (*checkpoints(output), *output.rglob("*_final.pt"))]
    outcome.lost.append(end - max([training_start(output, started) or end, *saved]))
    return True


def finish(arguments: list[str], output: Path | None = None) -> float:
    """Run a command to its end. Returns the seconds since training started."""
    started = time.time()
    result = subprocess.run(arguments, cwd=REPO, env=environment(), capture_output=True, text=True, check=False)
    if result.returncode:
        emit(f"{' '.join(arguments)} ended with exit code {result.returncode}:\n{result.stdout}{result.stderr}")
        raise subprocess.CalledProcessError(result.returncode, arguments)
    return time.time() - (training_start(output, started) or started) if output else 0.0


def training_start(output: Path, after: float) -> float | None:
    """Return the time of the first training step that a run has logged after a time; None if there is none."""
    steps = (line for path in output.rglob("*.log") for line in path.read_text(errors="replace").splitlines())
    times = (datetime.fromisoformat(line[:23].replace(",", ".")).timestamp() for line in steps if " INFO step=" in line)
    return min((time for time in times if time >= after), default=None)


def checkpoints(output: Path) -> list[Path]:
    return list(output.rglob(LAST))


def equal(output: Path, expected: Path) -> bool:
    """Return whether the results of two runs of a stage have the same weights, bit for bit."""
    actual, whole = (weights(next(directory.glob("*_final.pt"))) for directory in (output, expected))
    return actual.keys() == whole.keys() and all(torch.equal(actual[name], whole[name]) for name in whole)


def weights(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True)["weights"])


def files(directory: Path) -> set[str]:
    """Return the relative paths of all files except those of TensorBoard, which has a new directory for each start."""
    paths = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    return {str(path) for path in paths if "tensorboard" not in path.parts}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def emit(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
