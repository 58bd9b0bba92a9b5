"""Our side: the real modules and datamodules in Lightning's own loop, with the rows in file order.

    python benchmarks/parity/ours.py WORK               writes WORK/ours/*.json, for the models in WORK

``run.py`` makes the models and starts this.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from cases import (
    ANSWER_LENGTH,
    BATCH_SIZE,
    CASES,
    CLIP,
    DEMONSTRATIONS,
    ITERATIONS,
    MAX_LENGTH,
    MISSING_EOS_PENALTY,
    OPTIMIZER,
    PASSES,
    PPO,
    PPO_OPTIMIZER,
    PROMPTS,
    STEPS,
    TEMPERATURE,
    TEMPLATE,
    Case,
    Iteration,
    fingerprint,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.data import PreferenceDataModule, PromptBatch, SequenceBatch
from rlhf.dpo import DPOModule, KTOModule, UnpairedDataModule, objective
from rlhf.models import Pretrained
from rlhf.ppo import PPOModule
from rlhf.reward import RewardDataModule, RewardModule
from rlhf.reward_functions import ModelReward
from rlhf.rl import Experience, KLController, Minibatch, RolloutDataModule, ScoreShaping, UpdateLimits
from rlhf.sampling import Rollout, SamplingParams
from rlhf.sft import SFTDataModule, SFTModule

REPO = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder with the models; results go to its folder ours/")
    parser.add_argument("--only", nargs="*", help="names of cases and iterations; without it, all")
    options = parser.parse_args()
    (options.work / "ours").mkdir(exist_ok=True)
    for case in CASES:
        if not options.only or case.name in options.only:
            write(options.work / "ours" / f"{case.name}.json", curve(case, options.work))
    for setting in ITERATIONS:
        if not options.only or setting.name in options.only:
            write(options.work / "ours" / f"ppo-{setting.name}.json", iteration(setting, options.work))


def write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result))
    sys.stdout.write(f"ours: {path.stem}\n")


def trainer(steps: int, **keys: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **keys,
    )


# curves


class SameHead(RewardModule):
    """The reward stage, with the head of a saved sequence classifier instead of a fresh one."""

    def configure_model(self) -> None:
        super().configure_model()
        saved = AutoModelForSequenceClassification.from_pretrained(Path(self.source.path))
        last = self.model.head.layers[-1]
        last.weight.data.copy_(saved.score.weight)
        last.bias.requires_grad_(False)  # it is 0 and stays so: the classifier has none


STAGES = {
    "sft": (SFTModule, SFTDataModule, "lm"),
    "reward": (SameHead, RewardDataModule, "reward"),
    "dpo": (DPOModule, PreferenceDataModule, "lm"),
    "kto": (KTOModule, UnpairedDataModule, "lm"),
}


def in_file_order(datamodule: type) -> type:
    """The stage's datamodule, with training rows in the order of the file instead of shuffled buckets.

    Batches of verdicts are turned round: KTO's baseline joins a prompt with the answer of the row after it, in TRL with
    that of the row before.
    """

    class InFileOrder(datamodule):
        bucket_by_length = False

        def train_dataloader(self) -> Any:
            return self.loader("train")

        def collate(self, rows: list[Any]) -> Any:
            return super().collate(rows[::-1] if datamodule is UnpairedDataModule else rows)

    return InFileOrder


class Record(lightning.Callback):
    """Keeps the logged numbers of every step, and what every batch held, in TRL's order."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.curve: list[dict[str, float]] = []
        self.batches: list[str] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        texts = batch if isinstance(batch, SequenceBatch) else batch.sequences
        # TRL's reward trainer does not know which part of a text is the answer
        rows = rows_of(texts, texts.attention_mask if self.stage == "reward" else texts.response_mask)
        self.batches.append(fingerprint(rows[::-1] if self.stage == "kto" else rows))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.curve.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def rows_of(texts: SequenceBatch, answers: Tensor) -> list[tuple[list[int], int]]:
    """Token ids of each row, and how many of them are its answer."""
    rows = zip(texts.input_ids, texts.attention_mask, answers, strict=True)
    return [
        (input_ids[attention_mask].tolist(), int(response_mask.sum()))
        for input_ids, attention_mask, response_mask in rows
    ]


def curve(case: Case, work: Path) -> dict[str, Any]:
    """Train one case: the numbers of every step."""
    module_class, data_class, folder = STAGES[case.stage]
    source = Pretrained(str(work / folder))
    module = module_class(policy=source, schedule="linear", **OPTIMIZER, **keywords(case))
    file = work / case.data.removeprefix("work:") if case.data.startswith("work:") else REPO / case.data
    data = in_file_order(data_class)(
        train=str(file),
        val_fraction=0,
        template=case.template,
        max_length=MAX_LENGTH,
        max_rows=STEPS * BATCH_SIZE,
        eval_batch_size=BATCH_SIZE,
    )
    module.tokenizer = data.tokenizer = source.tokenizer()
    if not case.bos:
        data.tokenizer.bos_token = None
    record = Record(case.stage)
    trainer(STEPS, gradient_clip_val=CLIP, callbacks=[record]).fit(module, data)
    return {"curve": record.curve, "batches": record.batches}


def keywords(case: Case) -> dict[str, Any]:
    """Our keywords of a case, with the objective's name replaced by the function, its own numbers filled in."""
    if "objective" not in case.ours:
        return case.ours
    named = case.ours["objective"]
    name, numbers = (named, {}) if isinstance(named, str) else named
    return {**case.ours, "objective": partial(getattr(objective, name), **numbers)}


# PPO

PASS_NUMBERS = {
    "policy loss": "loss/policy_avg",
    "value loss": "loss/value_avg",
    "approximate KL": "policy/approxkl_avg",
    "entropy": "policy/entropy_avg",
    "ratio": "policy/ratio",
}


class Recorded(PPOModule):
    """The PPO stage, with a reference and a critic of their own and a note of what it computes."""

    def __init__(self, work: Path, **keys: Any) -> None:
        super().__init__(**keys)
        self.work = work
        self.note: dict[str, Any] = {"passes": []}

    def configure_model(self) -> None:
        super().configure_model()
        # the KL would be 0 if policy and reference were one model, and so would be what is left of the score at the end
        # if critic and reward model were one
        reference = AutoModelForCausalLM.from_pretrained(self.work / "reference", dtype=torch.float32)
        self.reference.model.lm.load_state_dict(reference.state_dict())
        self.critic.load_state_dict(Pretrained(str(self.work / "critic")).scalar_model(self.tokenizer).state_dict())
        # TRL's critic has no bias
        self.critic.head.layers[-1].bias.requires_grad_(False)

    def judge(self, rollout: Rollout, prompts: PromptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        raw, single = super().judge(rollout, prompts)
        self.note["scores"] = raw.tolist()
        return raw, single

    def estimate_advantages(self, rewards: Tensor, seen: Experience) -> tuple[Tensor, Tensor]:
        whitened, returns = super().estimate_advantages(rewards, seen)
        rows = zip(seen.rollout.input_ids, seen.rollout.attention_mask, seen.rollout.response_mask, strict=True)
        self.note["rollout"] = [
            {"prompt": input_ids[attention_mask & ~response_mask].tolist(), "answer": input_ids[response_mask].tolist()}
            for input_ids, attention_mask, response_mask in rows
        ]
        tensors = {
            "logprobs": seen.logprobs,
            "reference": seen.ref_logprobs,
            "kl": seen.kl,
            "values": seen.values,
            "advantages": returns - seen.values,
            "whitened advantages": whitened,
            "returns": returns,
        }
        self.note.update({name: by_row(values, seen.rollout.response_mask) for name, values in tensors.items()})
        return whitened, returns

    def compute_loss(self, part: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, numbers = super().compute_loss(part)
        self.note["passes"].append({label: float(numbers[name]) for label, name in PASS_NUMBERS.items()})
        return loss, numbers


def by_row(values: Tensor, response_mask: Tensor) -> list[list[float]]:
    """[batch, time] values of answer tokens as one list a row."""
    return [row[attention_mask].tolist() for row, attention_mask in zip(values, response_mask, strict=True)]


def iteration(setting: Iteration, work: Path) -> dict[str, Any]:
    """One PPO iteration: what was answered, and what was computed of it."""
    source = Pretrained(str(work / f"policy-{setting.name}"))
    module = Recorded(
        work,
        policy=source,
        reward_model=Pretrained(str(work / "reward")),
        reward=ModelReward(),
        sampling=SamplingParams(max_new_tokens=ANSWER_LENGTH, temperature=TEMPERATURE),
        scores=ScoreShaping(
            subtract_mean=False, scale_by_std=False, clip=None, missing_eos_penalty=MISSING_EOS_PENALTY
        ),
        kl=KLController(advantage=setting.estimator),
        limits=UpdateLimits(),
        gamma=setting.gamma,
        gae_lambda=setting.gae_lambda,
        whiten_rewards=setting.whiten_rewards,
        ppo_epochs=PASSES,
        minibatch_size=PROMPTS,
        schedule="constant",
        **PPO,
        **PPO_OPTIMIZER,
    )
    data = RolloutDataModule(
        train=str(REPO / DEMONSTRATIONS),
        val_fraction=0,
        template=TEMPLATE,
        max_length=MAX_LENGTH,
        max_rows=PROMPTS,
        batch_size=PROMPTS,
    )
    module.tokenizer = data.tokenizer = source.tokenizer()
    lightning.seed_everything(0, verbose=False)
    trainer(PASSES).fit(module, data)
    return module.note


if __name__ == "__main__":
    main()
