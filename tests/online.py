"""Tiny runs of the stages that learn from their own answers, and what happened in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from helpers import PROMPTS, Fixed
from rlhf.ppo import PPOModule
from rlhf.reward_functions import ModelReward
from rlhf.rl import KLController, Minibatch, OnPolicyModule, RolloutDataModule, ScoreShaping, UpdateLimits
from rlhf.sampling import SamplingParams


class Record(lightning.Callback):
    """Keeps what training did: the minibatches, the rollouts' numbers, and the gradient each optimizer step used."""

    def __init__(self) -> None:
        self.parts: list[Minibatch] = []
        self.numbers: list[dict[str, Any]] = []
        self.norms: list[float] = []
        self.updates: list[dict[str, float]] = []

    def on_train_start(self, trainer: lightning.Trainer, module: OnPolicyModule) -> None:
        trainer.optimizers[0].register_step_post_hook(self.note_step)

    def on_train_batch_start(self, trainer: Any, module: Any, part: Minibatch, batch_idx: int) -> None:
        self.parts.append(part)
        if part.last:
            self.numbers.append(module._iteration)

    def on_before_optimizer_step(self, trainer: Any, module: OnPolicyModule, optimizer: Any) -> None:
        self.updates.append({name: float(values[-1]) for name, values in module._updates.items()})

    def note_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.norms.append(float(nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])))


class Setting:
    """Builds and trains tiny runs of a stage; every call starts from the same models and seed."""

    stage: Callable[..., OnPolicyModule] = PPOModule

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, policy: Fixed, judge: Fixed) -> None:
        self.tokenizer, self.policy, self.judge = tokenizer, policy, judge
        self.prompts = folder / "prompts.jsonl"
        self.prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))

    def module(self, **keys: Any) -> Any:
        given = {
            "reward_model": self.judge,
            "reward": ModelReward(),
            "kl": KLController(),
            "limits": UpdateLimits(),
            "sampling": SamplingParams(max_new_tokens=8, temperature=0.7),
            "scores": ScoreShaping(),
            "minibatch_size": 4,
            "ppo_epochs": 2,
            "learning_rate": 1e-3,
            "schedule": "constant",
            **keys,
        }
        module = self.stage(policy=self.policy, **given)
        module.tokenizer = self.tokenizer
        return module

    def train(
        self, *, trainer: dict[str, Any] | None = None, resume: Path | None = None, **keys: Any
    ) -> tuple[Any, Record]:
        module, record = self.module(**keys), Record()
        prompts = 8 // module.num_generations
        data = RolloutDataModule(train=str(self.prompts), val_fraction=0, max_length=64, batch_size=prompts)
        data.tokenizer = self.tokenizer
        lightning.seed_everything(7, verbose=False)
        self.trainer = lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[record],
            **{"max_epochs": 1, **(trainer or {})},
        )
        self.trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        return module, record


def assert_same(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), **tolerance)


def changed(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)
