"""TRL's side of the training curves: its own trainers on the same weights, texts and order.

    trl/bin/python benchmarks/parity/trl_curves.py WORK        writes WORK/trl/*.json for the models in WORK

It runs in an environment with TRL 1.16. TRL tokenizes the texts itself; ``run.py`` checks that the token ids of every
batch are the same on both sides.
"""

import argparse
import json
import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cases import BATCH_SIZE, CASES, CLIP, MAX_LENGTH, OPTIMIZER, STEPS, Case, fingerprint
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

REPO = Path(__file__).parents[2]
HOMES = {"CPO": "trl.experimental.cpo", "ORPO": "trl.experimental.orpo"}  # trl exports the others itself


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "work", type=Path, help="directory with the models; results are written to its subdirectory trl/"
    )
    parser.add_argument("--only", nargs="*", help="names of cases; default: all")
    options = parser.parse_args()
    (options.work / "trl").mkdir(exist_ok=True)
    for case in CASES:
        if not options.only or case.name in options.only:
            path = options.work / "trl" / f"{case.name}.json"
            path.write_text(json.dumps({**curve(case, options.work), "version": version("trl")}))
            sys.stdout.write(f"TRL {version('trl')}: {case.name}\n")


def curve(case: Case, work: Path) -> dict[str, Any]:
    """Train one case with TRL and return the metrics of every step."""
    kind = case.trainer.removesuffix("Trainer")
    home = import_module(HOMES.get(kind, "trl"))
    folder = work / ("reward" if kind == "Reward" else "lm")
    opener = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [trl_record(row, case, tokenizer.bos_token if case.bos else "") for row in records(case, work)]
    if not case.bos:
        tokenizer.bos_token = None
    with tempfile.TemporaryDirectory() as output:
        trainer = recording(getattr(home, case.trainer))(
            model=opener.from_pretrained(folder),
            args=getattr(home, f"{kind}Config")(output_dir=output, **settings(), **case.theirs),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
    steps = zip(trainer.logged, trainer.losses, strict=True)
    # Losses are recorded where they are computed, because the logged ones are rounded.
    return {"curve": [{**numeric(logs), "loss": loss} for logs, loss in steps], "batches": trainer.batches}


def settings() -> dict[str, Any]:
    """Return our hyperparameters under TRL's names. Everything else that TRL does is disabled."""
    return {
        "per_device_train_batch_size": BATCH_SIZE,
        "max_steps": STEPS,
        "learning_rate": OPTIMIZER["learning_rate"],
        "weight_decay": OPTIMIZER["weight_decay"],
        "adam_beta1": OPTIMIZER["betas"][0],
        "adam_beta2": OPTIMIZER["betas"][1],
        "adam_epsilon": OPTIMIZER["eps"],
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "max_grad_norm": CLIP,
        "max_length": MAX_LENGTH,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def records(case: Case, work: Path) -> list[dict[str, Any]]:
    """Return the rows of the file that are used in training."""
    file = work / case.data.removeprefix("work:") if case.data.startswith("work:") else REPO / case.data
    return [json.loads(line) for line in file.read_text().splitlines()[: STEPS * BATCH_SIZE]]


def trl_record(row: dict[str, Any], case: Case, bos: str) -> dict[str, Any]:
    """Return a record as TRL reads it: the prompt with BOS and template, responses after a space. TRL adds EOS."""
    row = dict(row)
    prompt = bos + case.template.replace("{prompt}", row.pop("document", None) or row.pop("prompt"))
    if "target" in row:
        row["completion"] = row.pop("target")
    return {"prompt": prompt, **{name: " " + value if isinstance(value, str) else value for name, value in row.items()}}


def recording(trainer: type) -> type:
    """Return a subclass of a TRL trainer that records its losses, its logs and a hash of every batch."""

    class Recording(trainer):
        def __init__(self, *args: Any, **keys: Any) -> None:
            self.losses: list[float] = []
            self.logged: list[dict[str, Any]] = []
            self.batches: list[str] = []
            super().__init__(*args, **keys)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **keys: Any) -> Any:
            self.batches.append(fingerprint(rows_of(inputs)))
            loss = super().compute_loss(model, inputs, *args, **keys)
            self.losses.append(float(loss))
            return loss

        def log(self, logs: dict[str, Any], *args: Any, **keys: Any) -> None:
            super().log(logs, *args, **keys)
            if "loss" in logs:
                self.logged.append(dict(logs))

    return Recording


def numeric(logs: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}


def rows_of(inputs: dict[str, Any]) -> list[tuple[list[int], int]]:
    """Return the token ids and the number of response tokens of each row, all chosen rows before all rejected ones.

    The names depend on the trainer: ``labels`` or ``completion_mask`` for the response, two tensors or one for pairs.
    """
    prefixes = ("chosen_", "rejected_") if "chosen_input_ids" in inputs else ("",)
    rows = []
    for prefix in prefixes:
        input_ids, attention_mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"].bool()
        if f"{prefix}labels" in inputs:
            response_mask = inputs[f"{prefix}labels"] != -100
        else:
            response_mask = inputs.get("completion_mask", attention_mask) == 1
        tensors = zip(input_ids, attention_mask, response_mask, strict=True)
        rows += [(ids[real].tolist(), int(response.sum())) for ids, real, response in tensors]
    return rows


if __name__ == "__main__":
    main()
