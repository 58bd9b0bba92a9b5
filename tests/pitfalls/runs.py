"""Tiny runs of every stage, put together from datamodule, module and Trainer as ``run.py`` does it."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers import ANSWERS, PROMPTS, Fixed
from rlhf.data import PreferenceDataModule
from rlhf.dpo import DPOModule
from rlhf.models import ScalarHead, ScalarModel
from rlhf.ppo import PPOModule
from rlhf.reward import RewardDataModule, RewardModule
from rlhf.reward_functions import ModelReward
from rlhf.rl import KLController, RolloutDataModule, ScoreShaping, UpdateLimits
from rlhf.sampling import SamplingParams
from rlhf.sft import SFTDataModule, SFTModule

DEMONSTRATIONS = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=False)]
PAIRS = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for prompt, chosen, rejected in zip(PROMPTS, ANSWERS, ANSWERS[1:], strict=False)
]
# stage: its classes and its 8 records
STAGES: dict[str, tuple[Any, Any, list[dict[str, Any]]]] = {
    "sft": (SFTModule, SFTDataModule, DEMONSTRATIONS),
    "reward": (RewardModule, RewardDataModule, PAIRS),
    "ppo": (PPOModule, RolloutDataModule, DEMONSTRATIONS),
    "dpo": (DPOModule, PreferenceDataModule, PAIRS),
}
# AdamW's eps is 1: a step is then close to lr x gradient, where the usual eps would turn the rounding noise of tiny
# gradients into whole steps
ONE_STEP = {"eps": 1.0, "learning_rate": 1.0}
PLAIN_SCORES = {"subtract_mean": False, "scale_by_std": False, "clip": None, "missing_eos_penalty": 0.0}


class Numbers(Logger):
    """Keeps what is logged, call by call."""

    name = version = "numbers"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""


class Batches(lightning.Callback):
    """Keeps the training batches, the sizes of the validation batches, and of the gradient that each step used."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.validated: list[int] = []
        self.norms: list[float] = []

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(self.note_step)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch)

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        self.validated.append(batch.sequence_count)

    def note_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(float(nn.utils.get_total_norm(gradients)))


@dataclass
class Run:
    """A stage with all that took part in its training."""

    module: Any
    data: Any
    trainer: lightning.Trainer
    kept: Batches
    logged: Numbers = field(default_factory=Numbers)

    @property
    def batches(self) -> list[Any]:
        """The training batches in their order."""
        return self.kept.seen

    def curve(self, name: str) -> list[float]:
        """What was logged under a name, in order."""
        return [call[name] for call in self.logged.calls if name in call]

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint would hold of the model."""
        return dict(self.module.state_dict())


class Runs:
    """Builds and fits runs of 8 records; every run starts from the same models and seed.

    Args:
        folder: for the records.
        tokenizer: of every run.
        lm: what every stage starts from; the reward model has its body and a head with random weights.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, lm: PreTrainedModel) -> None:
        self.folder, self.tokenizer, self.lm = folder, tokenizer, lm
        torch.manual_seed(1)
        self.judge: nn.Module = ScalarModel(deepcopy(lm.base_model), ScalarHead(lm.config.hidden_size))

    def write(self, name: str, rows: Sequence[dict[str, Any]]) -> str:
        """A file of records."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def build(
        self,
        stage: str,
        *,
        data: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        callbacks: Sequence[lightning.Callback] = (),
        **keys: Any,
    ) -> Run:
        """A stage that has not been trained yet: one epoch in one batch, at a constant learning rate of 1e-3."""
        module_class, data_class, records = STAGES[stage]
        # as a fresh model comes: Lightning trains a module in the mode that it finds it in
        for model in (self.lm, self.judge):
            model.train()
        given = {"policy": Fixed(self.lm), "learning_rate": 1e-3, "schedule": "constant", **_own_keys(stage)}
        if stage == "ppo":
            given["reward_model"] = Fixed(self.judge)
        files = {"train": self.write(stage, records), "val_fraction": 0, "max_length": 96, "batch_size": 8}
        module, datamodule = module_class(**{**given, **keys}), data_class(**{**files, **(data or {})})
        module.tokenizer = datamodule.tokenizer = self.tokenizer
        kept, logged = Batches(), Numbers()
        fitted = lightning.Trainer(
            logger=logged,
            callbacks=[*callbacks, kept],
            **{
                "accelerator": "cpu",
                "max_epochs": 1,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "default_root_dir": self.folder,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
                **(trainer or {}),
            },
        )
        return Run(module, datamodule, fitted, kept, logged)

    def fit(self, stage: str, *, resume: Path | None = None, **keys: Any) -> Run:
        """Train a stage; keys as for ``build``."""
        run = self.build(stage, **keys)
        lightning.seed_everything(7, verbose=False)
        run.trainer.fit(run.module, run.data, ckpt_path=resume, weights_only=True)
        return run


def _own_keys(stage: str) -> dict[str, Any]:
    if stage == "sft":
        return {"samples": 0}
    if stage == "ppo":
        sampling = SamplingParams(max_new_tokens=8, temperature=0.7)
        shared = {"reward": ModelReward(), "scores": ScoreShaping(), "kl": KLController(), "limits": UpdateLimits()}
        return {**shared, "sampling": sampling, "minibatch_size": 8, "ppo_epochs": 1}
    return {}


def texts(batch: Any) -> Any:
    """Tokens, mask and answer of a batch of any stage, [batch, time] each."""
    return getattr(batch, "sequences", batch)


@torch.no_grad()
def ends_often(lm: PreTrainedModel, eos: int) -> PreTrainedModel:
    """Raise the logit of EOS by about 3: at temperature 0.7 every fifth token ends its answer."""
    embedding = lm.get_output_embeddings().weight
    embedding += 0.1  # now hidden states share a direction; all logits move alike, so nothing else changes
    states = lm.base_model(input_ids=torch.arange(3, 67)[None], use_cache=False).last_hidden_state[0]
    common = states.mean(dim=0)
    embedding[eos] += 3 * common / common.square().sum()
    return lm


@torch.no_grad()
def logprobs_alone(lm: PreTrainedModel, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Distributions that the plain model gives for the tokens 1, 2, ... of one text: [time - 1, vocabulary], nats."""
    return (lm.eval()(input_ids=ids[None]).logits[0, :-1] / temperature).log_softmax(dim=-1)


@torch.no_grad()
def score_alone(model: ScalarModel, ids: Tensor) -> float:
    """The head's number at the last token of one text, by the plain body."""
    return float(model.head(model.trunk.eval()(input_ids=ids[None], use_cache=False).last_hidden_state[0, -1]))
