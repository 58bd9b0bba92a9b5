"""Our side: the real modules and datamodules in Lightning's training loop, with the rows in file order.

    python benchmarks/parity/ours.py WORK               writes WORK/ours/*.json for the models in WORK

``run.py`` makes the models and starts this script.
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
    RESPONSE_LENGTH,
    STEPS,
    TEMPERATURE,
    TEMPLATE,
    Case,
    Iteration,
    fingerprint,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.data import EncodedResponse, PreferenceDataModule, SequenceBatch, UnpairedDataModule, replace_response
from rlhf.dpo import DPOModule, KTOModule, objective
from rlhf.models import Pretrained
from rlhf.ppo import PPOModule
from rlhf.reward import RewardDataModule, RewardModule
from rlhf.reward_functions import ModelReward, ScoringBatch
from rlhf.rl import Experience, KLController, Minibatch, RolloutDataModule, ScoreShaping, UpdateLimits
from rlhf.sampling import SamplingParams
from rlhf.sft import SFTDataModule, SFTModule

REPO = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="directory with the models; results go to its subdirectory ours/")
    parser.add_argument("--only", nargs="*", help="names of cases and iterations; default: all")
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
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **keys,
    )


# Training curves


class SameHead(RewardModule):
    """The reward stage with the head of a saved sequence classifier instead of a new one."""

    def open_models(self) -> None:
        super().open_models()
        saved = AutoModelForSequenceClassification.from_pretrained(Path(self.source.path))
        last = self.model.head.layers[-1]
        last.weight.data.copy_(saved.score.weight)
        last.bias.requires_grad_(False)  # It stays 0: the classifier has no bias.


STAGES = {
    "sft": (SFTModule, SFTDataModule, "lm"),
    "reward": (SameHead, RewardDataModule, "reward"),
    "dpo": (DPOModule, PreferenceDataModule, "lm"),
    "kto": (KTOModule, UnpairedDataModule, "lm"),
}


def in_file_order(datamodule: type) -> type:
    """Return a subclass of a datamodule whose training rows are in file order.

    Our KL baseline of KTO combines a prompt with a response to another prompt, and TRL's with that of the previous row
    of the batch. Unpaired rows get TRL's combinations here.
    """

    class InFileOrder(datamodule):
        bucket_by_length = False

        def train_dataloader(self) -> Any:
            return self.loader("train")

        def encoded(self, split: str) -> Any:
            rows = super().encoded(split)
            if datamodule is UnpairedDataModule:
                bos, last = self.tokenizer.bos_token_id, len(rows) - 1

                def mismatched(index: int) -> EncodedResponse:
                    first = index - index % BATCH_SIZE
                    previous = index - 1 if index > first else min(first + BATCH_SIZE - 1, last)
                    return replace_response(rows.value(index, "text"), rows.value(previous, "text"), MAX_LENGTH, bos)

                rows.extend("mismatched", mismatched)
            return rows

    return InFileOrder


class Recorder(lightning.Callback):
    """Records the logged metrics of every step and a hash of every batch."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.curve: list[dict[str, float]] = []
        self.batches: list[str] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        sequences = batch if isinstance(batch, SequenceBatch) else batch.sequences
        # TRL's reward trainer does not know which part of a sequence is the response.
        mask = sequences.attention_mask if self.stage == "reward" else sequences.response_mask
        self.batches.append(fingerprint(rows_of(sequences, mask)))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.curve.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def rows_of(sequences: SequenceBatch, response_mask: Tensor) -> list[tuple[list[int], int]]:
    """Return the token ids and the number of response tokens of each row."""
    rows = zip(sequences.input_ids, sequences.attention_mask, response_mask, strict=True)
    return [(input_ids[real].tolist(), int(response.sum())) for input_ids, real, response in rows]


def curve(case: Case, work: Path) -> dict[str, Any]:
    """Train one case and return the metrics of every step."""
    module_class, data_class, folder = STAGES[case.stage]
    source = Pretrained(str(work / folder))
    module = module_class(policy=source, schedule="linear", warmup_ratio=0.0, **OPTIMIZER, **keywords(case))
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
    recorder = Recorder(case.stage)
    trainer(STEPS, gradient_clip_val=CLIP, callbacks=[recorder]).fit(module, data)
    return {"curve": recorder.curve, "batches": recorder.batches}


def keywords(case: Case) -> dict[str, Any]:
    """Return our keywords of a case, with the name of the loss replaced by the function."""
    if "loss" not in case.ours:
        return case.ours
    loss = case.ours["loss"]
    name, settings = (loss, {}) if isinstance(loss, str) else loss
    return {**case.ours, "loss": partial(getattr(objective, name), **settings)}


# PPO

PASS_METRICS = {
    "policy loss": "loss/policy_avg",
    "value loss": "loss/value_avg",
    "approximate KL": "policy/approxkl_avg",
    "entropy": "policy/entropy_avg",
    "ratio": "policy/ratio",
}


class RecordedReward(ModelReward):
    """The reward model, with its latest scores as a list."""

    def forward(self, batch: ScoringBatch) -> Tensor:
        scores = super().forward(batch)
        self.scores: list[float] = scores.tolist()
        return scores


class RecordedPPO(PPOModule):
    """The PPO stage with separate weights of the reference model and the critic. It records what it computes."""

    def __init__(self, work: Path, **keys: Any) -> None:
        super().__init__(**keys)
        self.work = work
        self.results: dict[str, Any] = {"passes": []}

    def open_models(self) -> None:
        super().open_models()
        # With equal weights, the KL would be 0, and so would the last advantages with the reward model as the critic.
        reference = AutoModelForCausalLM.from_pretrained(self.work / "reference", dtype=torch.float32)
        self.reference.model.lm.load_state_dict(reference.state_dict())
        self.critic.load_state_dict(Pretrained(str(self.work / "critic")).scalar_model(self.tokenizer).state_dict())
        self.critic.head.layers[-1].bias.requires_grad_(False)  # TRL's critic has no bias.

    def estimate_advantages(
        self, rewards: Tensor, scores: Tensor, experience: Experience
    ) -> tuple[Tensor, Tensor | None]:
        whitened, returns = super().estimate_advantages(rewards, scores, experience)
        rollout = experience.rollout
        rows = zip(rollout.input_ids, rollout.attention_mask, rollout.response_mask, strict=True)
        self.results["rollout"] = [
            {"prompt": input_ids[real & ~response].tolist(), "response": input_ids[response].tolist()}
            for input_ids, real, response in rows
        ]
        tensors = {
            "logprobs": experience.logprobs,
            "ref_logprobs": experience.ref_logprobs,
            "kl": experience.kl,
            "values": experience.values,
            "advantages": returns - experience.values,
            "whitened advantages": whitened,
            "returns": returns,
        }
        self.results.update({name: by_row(values, rollout.response_mask) for name, values in tensors.items()})
        return whitened, returns

    def compute_loss(self, minibatch: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().compute_loss(minibatch)
        self.results["passes"].append({label: float(metrics[name]) for label, name in PASS_METRICS.items()})
        return loss, metrics


def by_row(values: Tensor, response_mask: Tensor) -> list[list[float]]:
    """Return [batch, time] values of response tokens as one list per row."""
    return [row[response].tolist() for row, response in zip(values, response_mask, strict=True)]


def iteration(setting: Iteration, work: Path) -> dict[str, Any]:
    """Run one PPO iteration and return its responses and what was computed from them."""
    source = Pretrained(str(work / f"policy-{setting.name}"))
    reward = RecordedReward()
    module = RecordedPPO(
        work,
        policy=source,
        reward_model=Pretrained(str(work / "reward")),
        reward=reward,
        sampling=SamplingParams(max_new_tokens=RESPONSE_LENGTH, temperature=TEMPERATURE),
        scores=ScoreShaping(
            subtract_mean=False, scale_by_std=False, clip=None, missing_eos_penalty=MISSING_EOS_PENALTY
        ),
        kl=KLController(estimator=setting.estimator),
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
    return {**module.results, "scores": reward.scores}


if __name__ == "__main__":
    main()
