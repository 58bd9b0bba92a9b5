"""TRL's side: its own trainers, on our batches or on batches in its own order.

    trl/bin/python benchmarks/speed/trl_side.py sft WORK/T/lm WORK/demonstrations.jsonl RESULT --batch-size 16

It runs in an environment with TRL 1.16.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from timing import Steps
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

KINDS = {"sft": "SFT", "dpo": "DPO", "dpo_live": "DPO", "reward": "Reward"}


class RecordSteps(TrainerCallback):
    """Records the end of every step.

    Args:
        steps: The record.
    """

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.counts = (0, 0)  # rows and real tokens of the last step

    def on_step_end(self, *args: Any, **keys: Any) -> None:
        self.steps.end(*self.counts)


def counting(trainer: type, record: RecordSteps, size: int) -> type:
    """Return a subclass of a TRL trainer that counts the tokens of every batch.

    Args:
        trainer: The trainer.
        record: Receives the counts.
        size: Rows per batch.
    """

    class Counting(trainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **keys: Any) -> Any:
            masks = [value for name, value in inputs.items() if name.endswith("attention_mask")]
            record.counts = (size, sum(int(mask.sum()) for mask in masks))
            return super().training_step(model, inputs, *args, **keys)

    return Counting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=KINDS)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("result")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rows", type=Path, help="a result of our side: use its batches")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.bos_token = None
    records = [json.loads(line) for line in options.data.open(encoding="utf-8", newline="\n")]
    order = [row for rows in json.loads(options.rows.read_text())["rows"] for row in rows] if options.rows else None
    rows = [record(records[i]) for i in (range(len(records)) if order is None else order)]
    # Only as many rows as are needed, so that TRL does not tokenize the others.
    rows = rows[: options.batch_size * options.steps]
    train(options, rows, tokenizer)


def record(row: dict[str, Any]) -> dict[str, str]:
    """Return a record as TRL reads it, with the text that our side trains on."""
    prompt = row.get("document") or row["prompt"]
    names = {"target": "completion", "chosen": "chosen", "rejected": "rejected"}
    return {"prompt": f"{prompt}\n", **{names[key]: row[key] for key in names if key in row}}


def train(options: Any, rows: list[dict[str, str]], tokenizer: Any) -> None:
    """Train with TRL and write the record."""
    kind = KINDS[options.stage]
    opener = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    settings: dict[str, Any] = {"precompute_ref_log_probs": options.stage == "dpo"} if kind == "DPO" else {}
    callback = RecordSteps(Steps(options.result))
    with tempfile.TemporaryDirectory() as output:
        trainer = counting(getattr(trl, f"{kind}Trainer"), callback, options.batch_size)(
            model=opener.from_pretrained(options.model, dtype=torch.float32),
            args=getattr(trl, f"{kind}Config")(
                output_dir=output,
                per_device_train_batch_size=options.batch_size,
                max_steps=options.steps,
                learning_rate=1e-4,
                max_length=512,
                bf16=options.bf16,
                use_cpu=True,
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **({"train_sampling_strategy": "sequential"} if options.rows else {}),
                **settings,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[callback],
        )
        callback.steps.watch(trainer.model.base_model)
        trainer.train()


if __name__ == "__main__":
    main()
