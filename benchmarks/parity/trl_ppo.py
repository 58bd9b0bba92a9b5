"""TRL's side of PPO: its PPOTrainer on our recorded responses.

    trl-ppo/bin/python benchmarks/parity/trl_ppo.py WORK       reads WORK/ours/ppo-*.json, writes WORK/trl/ppo-*.json

It runs in an environment with TRL 1.12. ``PPOTrainer.train`` does everything in one method. It runs unchanged with one
exception: instead of sampling, it receives our responses. What it computes is read from its local variables when it
whitens the advantages and at each backward pass. A second run divides its advantages by the population standard
deviation, as we do, instead of the sample standard deviation; what still differs then has another cause.
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
    ITERATIONS,
    MISSING_EOS_PENALTY,
    PASSES,
    PPO,
    PPO_OPTIMIZER,
    PROMPTS,
    RESPONSE_LENGTH,
    TEMPERATURE,
    Iteration,
)
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

WHITEN = ppo_trainer.masked_whiten  # TRL's own function, before it is replaced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "work",
        type=Path,
        help="directory with the models and our results; results are written to its subdirectory trl/",
    )
    parser.add_argument("--only", nargs="*", help="names of iterations; default: all")
    options = parser.parse_args()
    (options.work / "trl").mkdir(exist_ok=True)
    for setting in ITERATIONS:
        if not options.only or setting.name in options.only:
            for population in (False, True):
                name = f"ppo-{setting.name}" + "-population" * population
                result = {**iteration(setting, options.work, population), "version": version("trl")}
                (options.work / "trl" / f"{name}.json").write_text(json.dumps(result))
                sys.stdout.write(f"TRL {version('trl')}: {name}\n")


def iteration(setting: Iteration, work: Path, population: bool) -> dict[str, Any]:
    """Run one PPO iteration of TRL on our responses and return what it computed."""
    recorded = json.loads((work / "ours" / f"ppo-{setting.name}.json").read_text())["rollout"]
    tokenizer = AutoTokenizer.from_pretrained(work / "lm", padding_side="left")
    recorder = Recorder(recorded, population)
    ppo_trainer.batch_generation = recorder.batch_generation
    ppo_trainer.masked_whiten = recorder.masked_whiten
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32)
        for name in (f"policy-{setting.name}", "reference")
    )
    reward_model, critic = (
        AutoModelForSequenceClassification.from_pretrained(work / name, dtype=torch.float32)
        for name in ("reward", "critic")
    )
    with tempfile.TemporaryDirectory() as output:
        trainer = PPOTrainer(
            args=PPOConfig(output_dir=output, **settings(setting)),
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward_model,
            value_model=critic,
            train_dataset=Dataset.from_list([{"input_ids": row["prompt"]} for row in recorded]),
        )
        trainer.accelerator.backward = recorder.record_losses(trainer.accelerator.backward)
        trainer.train()
    return recorder.results


def settings(setting: Iteration) -> dict[str, Any]:
    """Return our hyperparameters under TRL's names: one iteration, with all responses in one minibatch per pass."""
    return {
        "per_device_train_batch_size": PROMPTS,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 1,
        "num_ppo_epochs": PASSES,
        "total_episodes": PROMPTS,
        "local_rollout_forward_batch_size": PROMPTS,
        "response_length": RESPONSE_LENGTH,
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


class Recorder:
    """Gives our responses to TRL and records what TRL computes, in the order of our rows.

    Args:
        recorded: Prompt and response of each row, as token ids.
        population: Whiten by the population standard deviation.
    """

    def __init__(self, recorded: list[dict[str, list[int]]], population: bool) -> None:
        self.recorded = recorded
        self.population = population
        self.results: dict[str, Any] = {"passes": []}
        self.order: list[int] = []  # index in TRL's shuffled batch of each of our rows

    def batch_generation(
        self, model: Any, queries: Tensor, batch_size: int, pad: int, generation_config: Any
    ) -> tuple[Tensor, Tensor]:
        """Replacement of TRL's sampling: return our responses to its queries, and the logits of their tokens."""
        prompts = [tuple(query[query != pad].tolist()) for query in queries]
        self.order = [prompts.index(tuple(row["prompt"])) for row in self.recorded]
        responses = {tuple(row["prompt"]): row["response"] for row in self.recorded}
        width = max(map(len, responses.values()))
        padded = torch.tensor([responses[prompt] + [pad] * (width - len(responses[prompt])) for prompt in prompts])
        input_ids = torch.cat([queries, padded], dim=1)
        logits = ppo_trainer.forward(model, input_ids, pad).logits[:, queries.shape[1] - 1 : -1]
        return input_ids, logits / generation_config.temperature

    def masked_whiten(self, values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        """Call TRL's function, without Bessel's correction in the second run, and record its caller's variables."""
        whitened = WHITEN(values, mask, shift_mean)
        if self.population:
            mean = 0.0 if shift_mean else ppo_trainer.masked_mean(values, mask)
            whitened = mean + (whitened - mean) * (mask.sum() / (mask.sum() - 1)).sqrt()
        if not shift_mean:  # The values are rewards.
            return whitened
        variables = caller(inspect.currentframe())
        self.results.update(
            {
                "logprobs": self.by_row(variables["logprobs"]),
                "ref_logprobs": self.by_row(variables["ref_logprobs"]),
                "kl": self.by_row(variables["kl"]),
                "values": self.by_row(variables["values"]),
                "scores": self.raw_scores(variables),
                "advantages": self.by_row(values),
                "whitened advantages": self.by_row(whitened),
                "returns": self.by_row(variables["returns"]),
                "value after the end": self.after_the_end(variables["values"]),
                "return after the end": self.after_the_end(variables["returns"]),
            }
        )
        return whitened

    def record_losses(self, backward: Any) -> Any:
        """Return a backward pass that first records the losses of its caller."""

        def recording(loss: Tensor, **keys: Any) -> None:
            variables = {
                name: value.detach() if isinstance(value, Tensor) else value
                for name, value in caller(inspect.currentframe()).items()
            }
            real = ~variables["padding_mask"][variables["micro_batch_inds"]]
            logits = variables["logits"]
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            self.results["passes"].append(
                {
                    "policy loss": float(variables["pg_loss"]),
                    "value loss": float(variables["vf_loss"]),
                    "approximate KL": float(0.5 * variables["logprobs_diff"].square().mean()),
                    "entropy": float(entropy.mean()),
                    "ratio": float(variables["ratio"].mean()),
                    "approximate KL, real tokens": float(0.5 * variables["logprobs_diff"][real].square().mean()),
                    "entropy, real tokens": float(entropy[real].mean()),
                    "ratio, real tokens": float(variables["ratio"][real].mean()),
                }
            )
            backward(loss, **keys)

        return recording

    def by_row(self, values: Tensor) -> list[list[float]]:
        """Return [batch, response] values as one list per row of ours, as long as its response."""
        rows = zip(self.order, self.recorded, strict=True)
        return [values[index, : len(row["response"])].tolist() for index, row in rows]

    def after_the_end(self, values: Tensor) -> list[float | None]:
        """Return the value one position after each response, or None if TRL's tensor ends there."""
        width = values.shape[1]
        rows = zip(self.order, (len(row["response"]) for row in self.recorded), strict=True)
        return [float(values[index, length]) if length < width else None for index, length in rows]

    def raw_scores(self, variables: dict[str, Any]) -> list[float]:
        """Return the scores of the reward model before the penalty for responses without EOS."""
        penalty = torch.where(variables["contain_eos_token"], 0.0, MISSING_EOS_PENALTY)
        return (variables["scores"] + penalty)[self.order].tolist()


def caller(frame: FrameType | None) -> dict[str, Any]:
    """Return the local variables of the caller of this frame's function."""
    above = frame.f_back if frame is not None else None
    return above.f_locals if above is not None else {}


if __name__ == "__main__":
    main()
