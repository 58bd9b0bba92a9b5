"""TRL's side of PPO: its PPOTrainer, given our recorded answers. Runs in an environment with TRL 1.12.

    trl-ppo/bin/python benchmarks/parity/trl_ppo.py WORK       reads WORK/ours/ppo-*.json, writes WORK/trl/ppo-*.json

``PPOTrainer.train`` does everything itself, inline. Here it runs unchanged with one exception: where it would sample,
it is handed our answers. What it computes is read from its own variables, when it whitens the advantages and at each
backward pass. A second run divides its advantages by the population's standard deviation, as we do, instead of the
sample's: what still differs then has another cause.
"""

import argparse
import inspect
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from cases import (
    ANSWER_LENGTH,
    ITERATIONS,
    MISSING_EOS_PENALTY,
    PASSES,
    PPO,
    PPO_OPTIMIZER,
    PROMPTS,
    TEMPERATURE,
    Iteration,
)
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

WHITEN = ppo_trainer.masked_whiten  # TRL's own, before it is watched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder with the models and our results; results go to its folder trl/")
    parser.add_argument("--only", nargs="*", help="names of iterations; without it, all")
    options = parser.parse_args()
    (options.work / "trl").mkdir(exist_ok=True)
    for setting in ITERATIONS:
        if not options.only or setting.name in options.only:
            for population in (False, True):
                name = f"ppo-{setting.name}" + "-population" * population
                note = {**iteration(setting, options.work, population), "version": version("trl")}
                (options.work / "trl" / f"{name}.json").write_text(json.dumps(note))
                sys.stdout.write(f"TRL {version('trl')}: {name}\n")


def iteration(setting: Iteration, work: Path, population: bool) -> dict[str, Any]:
    """One PPO iteration of TRL over our answers: what it computed."""
    recorded = json.loads((work / "ours" / f"ppo-{setting.name}.json").read_text())["rollout"]
    tokenizer = AutoTokenizer.from_pretrained(work / "lm", padding_side="left")
    watch = Watch(recorded, population)
    ppo_trainer.batch_generation = watch.batch_generation
    ppo_trainer.masked_whiten = watch.masked_whiten
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32)
        for name in (f"policy-{setting.name}", "reference")
    )
    judge, critic = (
        AutoModelForSequenceClassification.from_pretrained(work / name, dtype=torch.float32)
        for name in ("reward", "critic")
    )
    with tempfile.TemporaryDirectory() as output:
        trainer = PPOTrainer(
            args=PPOConfig(output_dir=output, **settings(setting)),
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=judge,
            value_model=critic,
            train_dataset=Dataset.from_list([{"input_ids": row["prompt"]} for row in recorded]),
        )
        trainer.accelerator.backward = watch.before(trainer.accelerator.backward)
        trainer.train()
    return watch.note


def settings(setting: Iteration) -> dict[str, Any]:
    """Our hyper-parameters by their names there: all answers in one minibatch, a few passes, one iteration."""
    return {
        "per_device_train_batch_size": PROMPTS,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 1,
        "num_ppo_epochs": PASSES,
        "total_episodes": PROMPTS,
        "local_rollout_forward_batch_size": PROMPTS,
        "response_length": ANSWER_LENGTH,
        "temperature": TEMPERATURE,
        "stop_token": "eos",
        "missing_eos_penalty": MISSING_EOS_PENALTY,
        "kl_coef": PPO["kl_coef"],
        "kl_estimator": setting.estimator,
        "whiten_rewards": setting.whiten_rewards,
        "cliprange": PPO["clip_range"],
        "cliprange_value": PPO["value_clip_range"],
        "vf_coef": PPO["value_coef"],
        "gamma": setting.gamma,
        "lam": setting.gae_lambda,
        "learning_rate": PPO_OPTIMIZER["learning_rate"],
        "weight_decay": PPO_OPTIMIZER["weight_decay"],
        "adam_beta1": PPO_OPTIMIZER["betas"][0],
        "adam_beta2": PPO_OPTIMIZER["betas"][1],
        "adam_epsilon": PPO_OPTIMIZER["eps"],
        "lr_scheduler_type": "constant",
        "num_sample_generations": 0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


class Watch:
    """Hands our answers to TRL, and notes what TRL computes, in the order of our rows.

    Args:
        recorded: prompt and answer of each row, token ids.
        population: whiten by the population's standard deviation.
    """

    def __init__(self, recorded: list[dict[str, list[int]]], population: bool) -> None:
        self.recorded = recorded
        self.population = population
        self.note: dict[str, Any] = {"passes": []}
        self.order: list[int] = []  # place in TRL's shuffled batch of each of our rows

    def batch_generation(
        self, model: Any, queries: Tensor, batch_size: int, pad: int, generation_config: Any
    ) -> tuple[Tensor, Tensor]:
        """Stands in for TRL's sampling: our answers to its queries, and the logits they were drawn from."""
        prompts = [tuple(query[query != pad].tolist()) for query in queries]
        self.order = [prompts.index(tuple(row["prompt"])) for row in self.recorded]
        answers = {tuple(row["prompt"]): row["answer"] for row in self.recorded}
        width = max(map(len, answers.values()))
        padded = torch.tensor([answers[prompt] + [pad] * (width - len(answers[prompt])) for prompt in prompts])
        texts = torch.cat([queries, padded], dim=1)
        logits = ppo_trainer.forward(model, texts, pad).logits[:, queries.shape[1] - 1 : -1]
        return texts, logits / generation_config.temperature

    def masked_whiten(self, values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        """TRL's own, with a note of what its caller knows by then; for the second run without Bessel's correction."""
        whitened = WHITEN(values, mask, shift_mean)
        if self.population:
            mean = 0.0 if shift_mean else ppo_trainer.masked_mean(values, mask)
            whitened = mean + (whitened - mean) * (mask.sum() / (mask.sum() - 1)).sqrt()
        if not shift_mean:  # these are rewards
            return whitened
        known = caller(inspect.currentframe())
        self.note.update(
            {
                "logprobs": self.by_row(known["logprobs"]),
                "reference": self.by_row(known["ref_logprobs"]),
                "kl": self.by_row(known["kl"]),
                "values": self.by_row(known["values"]),
                "scores": self.raw_scores(known),
                "advantages": self.by_row(values),
                "whitened advantages": self.by_row(whitened),
                "returns": self.by_row(known["returns"]),
                "value after the end": self.after_the_end(known["values"]),
                "return after the end": self.after_the_end(known["returns"]),
            }
        )
        return whitened

    def before(self, backward: Any) -> Any:
        """A backward pass that first notes its caller's losses."""

        def noting(loss: Tensor, **keys: Any) -> None:
            known = {
                name: value.detach() if isinstance(value, Tensor) else value
                for name, value in caller(inspect.currentframe()).items()
            }
            real = ~known["padding_mask"][known["micro_batch_inds"]]
            logits = known["logits"]
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            self.note["passes"].append(
                {
                    "policy loss": float(known["pg_loss"]),
                    "value loss": float(known["vf_loss"]),
                    "approximate KL": float(0.5 * known["logprobs_diff"].square().mean()),
                    "entropy": float(entropy.mean()),
                    "ratio": float(known["ratio"].mean()),
                    "approximate KL, real tokens": float(0.5 * known["logprobs_diff"][real].square().mean()),
                    "entropy, real tokens": float(entropy[real].mean()),
                    "ratio, real tokens": float(known["ratio"][real].mean()),
                }
            )
            backward(loss, **keys)

        return noting

    def by_row(self, values: Tensor) -> list[list[float]]:
        """[batch, response] values as one list a row of ours, as long as its answer."""
        rows = zip(self.order, self.recorded, strict=True)
        return [values[place, : len(row["answer"])].tolist() for place, row in rows]

    def after_the_end(self, values: Tensor) -> list[float | None]:
        """The value one slot after each answer, where TRL has such a slot."""
        width = values.shape[1]
        rows = zip(self.order, (len(row["answer"]) for row in self.recorded), strict=True)
        return [float(values[place, length]) if length < width else None for place, length in rows]

    def raw_scores(self, known: dict[str, Any]) -> list[float]:
        """The reward model's scores, before the penalty for answers without EOS."""
        penalty = torch.where(known["contain_eos_token"], 0.0, MISSING_EOS_PENALTY)
        return (known["scores"] + penalty)[self.order].tolist()


def caller(frame: FrameType | None) -> dict[str, Any]:
    """The local variables of whoever called the function of this frame."""
    above = frame.f_back if frame is not None else None
    return above.f_locals if above is not None else {}


if __name__ == "__main__":
    main()
