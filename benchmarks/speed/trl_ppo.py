"""TRL's side of PPO, in an environment with TRL 1.12, the last version whose PPO trainer has a separate value model.

trl12/bin/python benchmarks/speed/trl_ppo.py ppo WORK/T/lm WORK/demonstrations.jsonl RESULT --batch-size 32 --steps 4
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from timing import Steps
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class RecordSteps(TrainerCallback):
    """Records the end of every iteration.

    Args:
        path: See ``Steps``.
        size: Responses of an iteration.
    """

    def __init__(self, path: str, size: int) -> None:
        self.steps, self.size = Steps(path), size

    def on_step_end(self, *args: Any, **keys: Any) -> None:
        self.steps.end(self.size, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["ppo"])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("result")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--response", type=int, default=64, help="tokens of prompts and responses")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    texts = [json.loads(line)["document"] for line in options.data.open(encoding="utf-8", newline="\n")]
    prompts = [
        tokenizer(f"{text}\n", add_special_tokens=False)["input_ids"][-options.response :] for text in texts[:2000]
    ]
    reward = options.model.parent / "reward"
    with tempfile.TemporaryDirectory() as output:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=output,
                per_device_train_batch_size=options.batch_size // 4,
                gradient_accumulation_steps=4,
                num_mini_batches=4,
                num_ppo_epochs=4,
                total_episodes=options.batch_size * options.steps,
                response_length=options.response,
                stop_token="eos",
                num_sample_generations=0,
                learning_rate=1e-4,
                bf16=options.bf16,
                use_cpu=True,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(options.model),
            ref_model=AutoModelForCausalLM.from_pretrained(options.model),
            reward_model=AutoModelForSequenceClassification.from_pretrained(reward),
            value_model=AutoModelForSequenceClassification.from_pretrained(reward),
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[RecordSteps(options.result, options.batch_size)],
        )
        trainer.train()


if __name__ == "__main__":
    main()
