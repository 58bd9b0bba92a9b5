"""The harness of every test that trains: tiny models, tiny records, a recorder, and the only Trainer of the tests.

A typical test asks for the fixture ``tiny_run`` (conftest.py) and trains a stage in Lightning's own loop:

    def test_clip_range_changes_the_weights(tiny_run: TinyRun) -> None:
        narrow = tiny_run.train("ppo", clip_range=0.01, trainer={"max_steps": 2})
        wide = tiny_run.train("ppo", clip_range=0.5, trainer={"max_steps": 2})
        assert narrow.curve("objective/kl")[0] == 0.0
        assert weights_differ(narrow.module.policy, wide.module.policy)

- Keywords of ``train`` and ``build`` are keywords of the stage's module; ``data=`` holds keywords of its datamodule and
  ``trainer=`` flags of ``lightning.Trainer``.
- Both return a ``Run`` with ``module``, ``datamodule``, ``trainer`` and ``recorder``. ``build`` does not train.
- Every run starts from copies of the same models and from the same seed, so runs with equal settings are equal to the
  last bit.
- A test folder that needs other defaults sets them in its conftest.py, for example
  ``tiny_run.stage_keys["ppo"]["ppo_epochs"] = 1``.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forked import run_python
from rlhf.data import PreferenceDataModule, UnpairedDataModule
from rlhf.dpo import DPOModule, KTOModule
from rlhf.grpo import GRPOModule
from rlhf.models import ScalarHead, ScalarModel
from rlhf.ppo import PPOModule
from rlhf.reward import RewardDataModule, RewardModule
from rlhf.reward_functions import ModelReward
from rlhf.rl import KLController, RolloutDataModule, ScoreShaping, UpdateLimits
from rlhf.rl.advantages import grpo
from rlhf.sampling import SamplingParams
from rlhf.sft import SFTDataModule, SFTModule

PROMPTS = [
    "The bridge opens.",
    "It rains.",
    "Nadia Falk sells a camera in Dunmore.",
    "May",
    "Who won?",
    "A",
    "B b",
    "See",
]
# RESPONSES[i] belongs to PROMPTS[i]. In preference pairs RESPONSES[i] is chosen and RESPONSES[i + 1] is rejected.
RESPONSES = [
    "May",
    "Nadia Falk, camera, Dunmore, May, 90 euros.",
    "In short, it rains.",
    "90 euros",
    "A",
    "The mayor opened it.",
    "B b",
    "Monday",
    "children, weather",
]

# The 8 records of each kind.
DEMONSTRATIONS = [
    {"prompt": prompt, "completion": response} for prompt, response in zip(PROMPTS, RESPONSES, strict=False)
]
PAIRS = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for prompt, chosen, rejected in zip(PROMPTS, RESPONSES, RESPONSES[1:], strict=False)
]
RATINGS = [
    {"prompt": prompt, "response": response, "reward": number / 2}
    for number, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=False))
]

EXACT = {"rtol": 0.0, "atol": 0.0}
NO_UPDATE = 1e-60  # a learning rate that is 0 in float32
# The same optimizer in every stage: a constant learning rate without warm-up, and PyTorch's defaults for AdamW.
PLAIN_ADAMW = {"schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}


# -- commands

# For tests of code that no architecture changes.
one_architecture = pytest.mark.parametrize("architecture", ["transformer"], indirect=True)
# Overrides of a tiny model of each architecture.
TINY_MODEL = {
    "transformer": ["model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.intermediate_size=32"],
    "mamba": ["model=mamba", "model.hidden_size=32", "model.num_layers=1", "model.head_dim=16", "model.state_size=8"],
}
# Overrides of a run on the CPU with few rows of the bundled data, to combine with a model of TINY_MODEL.
TINY_DATA = ["trainer=cpu", "model.vocab_size=300", "data.max_rows=40"]


def train_command(root: Path, *overrides: str) -> list[str]:
    """Return ``python train.py`` with overrides and with outputs under ``root``, to run in the repository's root."""
    return [sys.executable, "train.py", *overrides, f"paths.root={root}"]


def run_train(repo: Path, root: Path, *overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``python train.py`` in a new process; with ``check``, its exit code must be 0."""
    # Tables must not depend on the width of the terminal.
    environment = {**os.environ, "COLUMNS": "200"}
    done = run_python(train_command(root, *overrides)[1:], repo, environment)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


# -- models


class FakeSource:
    """A model source that hands out copies of one model, as a stage's exported file would.

    Args:
        model: A causal language model or a ``ScalarModel``. It is never modified.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def language_model(self, tokenizer: Any) -> Any:
        return deepcopy(self.model)

    scalar_model = language_model


def tiny_reward_model(lm: PreTrainedModel) -> ScalarModel:
    """Return a reward model with the trunk of ``lm`` and a linear head with random weights, the same every time."""
    torch.manual_seed(1)
    return ScalarModel(deepcopy(lm.base_model), ScalarHead(lm.get_output_embeddings().weight.shape[1]))


@torch.no_grad()
def make_eos_likely(lm: PreTrainedModel, eos: int) -> PreTrainedModel:
    """Raise the logit of EOS by about 3, in place, so that sampled responses have different lengths.

    A random model gives 300 tokens about the same logit. At temperature 0.7 every fifth token is then an EOS:
    e^(3 / 0.7) / (e^(3 / 0.7) + 300) = 0.2.
    """
    embedding = lm.get_output_embeddings().weight
    embedding += 0.1  # All logits move alike, so probabilities stay; the hidden states now share a direction.
    states = lm.base_model(input_ids=torch.arange(3, 67)[None], use_cache=False).last_hidden_state[0]
    common = states.mean(dim=0)
    embedding[eos] += 3 * common / common.square().sum()
    return lm


# -- one run


class MetricsLogger(Logger):
    """A logger that keeps every ``log_metrics`` call in ``calls``, and their number at each ``save`` in ``saved``."""

    name = version = "metrics"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, float]] = []
        self.saved: list[int] = []

    def save(self) -> None:
        self.saved.append(len(self.calls))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignored."""


class RunRecorder(lightning.Callback):
    """Records what happens during training. Lists are in the order of training.

    Attributes:
        batches: Training batches: ``SequenceBatch``, ``PairBatch``, ... or, in PPO and GRPO, ``Minibatch``.
        metrics: ``trainer.callback_metrics`` after each training batch, as floats. PPO and GRPO log once
            per rollout: use ``Run.curve`` or ``rollouts`` there.
        rollouts: PPO and GRPO only: metrics of each rollout, before any update.
        updates: PPO and GRPO only: metrics of the latest minibatch before each optimizer step.
        grad_norms: Norm of the gradient that each optimizer step used, that is, after clipping.
        validation_sizes: Sequence count of each validation batch.
        initial_weights: State dict of the module before the first step.
    """

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.metrics: list[dict[str, float]] = []
        self.rollouts: list[dict[str, Any]] = []
        self.updates: list[dict[str, float]] = []
        self.grad_norms: list[float] = []
        self.validation_sizes: list[int] = []
        self.initial_weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.initial_weights = deepcopy(module.state_dict())
        trainer.optimizers[0].register_step_post_hook(self._record_step)

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        if getattr(batch, "first", False):
            self.rollouts.append(dict(batch.rollout_metrics))

    def on_before_optimizer_step(self, trainer: lightning.Trainer, module: Any, optimizer: Any) -> None:
        if hasattr(module, "iteration_metrics"):
            collected = module.iteration_metrics
            means = {**collected.steps.means, **collected.step.means}
            self.updates.append({name: float(values[-1].value) for name, values in means.items()})

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        self.validation_sizes.append(batch.sequence_count)

    def _record_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norms.append(float(nn.utils.get_total_norm(gradients)))


@dataclass
class Run:
    """A stage with everything that takes part in its training."""

    module: Any
    datamodule: Any
    trainer: lightning.Trainer
    recorder: RunRecorder
    logger: MetricsLogger

    @property
    def batches(self) -> list[Any]:
        """Training batches in order."""
        return self.recorder.batches

    @property
    def weights(self) -> dict[str, Tensor]:
        """State dict of the module."""
        return dict(self.module.state_dict())

    def curve(self, name: str) -> list[float]:
        """Every value that was logged under ``name``, in order. PPO and GRPO log once per rollout."""
        return [call[name] for call in self.logger.calls if name in call]

    def fit(self, resume: Path | None = None) -> "Run":
        """Train, from the checkpoint ``resume`` if there is one."""
        lightning.seed_everything(7, verbose=False)
        self.trainer.fit(self.module, self.datamodule, ckpt_path=resume, weights_only=True)
        return self


def quick_trainer(*, callbacks: Iterable[lightning.Callback] = (), logger: Any = False, **flags: Any) -> Any:
    """Return a ``lightning.Trainer`` for tests: CPU, one epoch, silent, and without files unless flags ask for them.

    Args:
        callbacks: As for ``lightning.Trainer``.
        logger: As for ``lightning.Trainer``.
        flags: Further arguments of ``lightning.Trainer``; they override the defaults below.
    """
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return lightning.Trainer(logger=logger, callbacks=list(callbacks), **{**defaults, **flags})


# -- runs of every stage


@dataclass(frozen=True)
class _Stage:
    """How a stage is built: its classes, its records and the keywords that it needs or that keep it small."""

    module: Callable[..., Any]
    datamodule: Callable[..., Any]
    records: list[dict[str, Any]]
    keys: Callable[[], dict[str, Any]] = dict


def _on_policy_keys() -> dict[str, Any]:
    return {
        "reward": ModelReward(),
        "kl": KLController(),
        "limits": UpdateLimits(),
        "scores": ScoreShaping(),
        "sampling": SamplingParams(max_new_tokens=8, temperature=0.7),
        "minibatch_size": 4,
        "ppo_epochs": 2,
    }


STAGES = {
    "sft": _Stage(SFTModule, SFTDataModule, DEMONSTRATIONS, lambda: {"samples": 0}),
    "reward": _Stage(RewardModule, RewardDataModule, PAIRS),
    "ppo": _Stage(PPOModule, RolloutDataModule, DEMONSTRATIONS, _on_policy_keys),
    "grpo": _Stage(
        GRPOModule,
        RolloutDataModule,
        DEMONSTRATIONS,
        lambda: {**_on_policy_keys(), "advantage": grpo, "num_generations": 4},
    ),
    "dpo": _Stage(DPOModule, PreferenceDataModule, PAIRS, lambda: {"samples": 0}),
    "kto": _Stage(KTOModule, UnpairedDataModule, PAIRS, lambda: {"samples": 0}),
}
ON_POLICY = ("ppo", "grpo")


class TinyRun:
    """Builds and trains tiny runs of any stage. Every run starts from the same models, records and seed.

    Without further keywords a run is one epoch over the 8 records of its stage, in batches of 8, with plain AdamW and a
    constant learning rate of 1e-3. PPO makes two passes over minibatches of 4; GRPO samples 4 responses per prompt.

    Args:
        folder: Directory for record files and for whatever a Trainer writes.
        tokenizer: Tokenizer of every run.
        lm: Language model that every stage starts from.
        reward_model: Scalar model for PPO and GRPO; None: ``tiny_reward_model(lm)``.

    Attributes:
        stage_keys: Keywords of the module that every run of a stage gets, by stage: {"ppo": {"ppo_epochs": 1}}.
        data_keys: Keywords of the datamodule that every run gets, whatever the stage.
        trainer_flags: Flags of ``lightning.Trainer`` that every run gets, whatever the stage.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        lm: PreTrainedModel,
        reward_model: nn.Module | None = None,
    ) -> None:
        self.folder, self.tokenizer, self.lm = folder, tokenizer, lm
        self.reward_model = reward_model or tiny_reward_model(lm)
        self.stage_keys: dict[str, dict[str, Any]] = defaultdict(dict)
        self.data_keys: dict[str, Any] = {}
        self.trainer_flags: dict[str, Any] = {}

    def write(self, name: str, rows: Sequence[dict[str, Any]]) -> str:
        """Write records to ``<name>.jsonl`` and return the path."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def module(self, stage: str, **keys: Any) -> Any:
        """Build the module of a stage from keywords of its class."""
        # A fresh model is in train mode, and Lightning trains a module in the mode that it finds.
        keys = {
            "policy": FakeSource(deepcopy(self.lm).train()),
            "learning_rate": 1e-3,
            **PLAIN_ADAMW,
            **STAGES[stage].keys(),
            **self.stage_keys[stage],
            **keys,
        }
        if stage in ON_POLICY:
            keys.setdefault("reward_model", FakeSource(deepcopy(self.reward_model).train()))
        module = STAGES[stage].module(**keys)
        module.tokenizer = self.tokenizer
        return module

    def datamodule(self, stage: str, **keys: Any) -> Any:
        """Build the datamodule of a stage from keywords of its class; ``train`` defaults to the stage's 8 records."""
        if "train" not in keys:
            keys["train"] = self.write(stage, STAGES[stage].records)
        defaults = {"val_fraction": 0, "max_length": 96, "batch_size": 8, "eval_batch_size": 8}
        datamodule = STAGES[stage].datamodule(**{**defaults, **self.data_keys, **keys})
        datamodule.tokenizer = self.tokenizer
        return datamodule

    def build(
        self,
        stage: str,
        *,
        data: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        callbacks: Iterable[lightning.Callback] = (),
        **keys: Any,
    ) -> Run:
        """Build a run without training it.

        Args:
            stage: One of ``STAGES``.
            data: Keywords of the datamodule.
            trainer: Flags of ``lightning.Trainer``.
            callbacks: Further callbacks.
            keys: Keywords of the module.
        """
        module = self.module(stage, **keys)
        size = {"batch_size": 8 // module.num_generations} if stage in ON_POLICY else {}
        datamodule = self.datamodule(stage, **{**size, **(data or {})})
        recorder, logger = RunRecorder(), MetricsLogger()
        flags = {"default_root_dir": self.folder, "logger": logger, **self.trainer_flags, **(trainer or {})}
        return Run(module, datamodule, quick_trainer(callbacks=[*callbacks, recorder], **flags), recorder, logger)

    def train(self, stage: str, *, resume: Path | None = None, **keys: Any) -> Run:
        """Build a run and train it; keywords as for ``build``, and ``resume``, the checkpoint to continue from."""
        return self.build(stage, **keys).fit(resume)


# -- comparisons


def assert_same_weights(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    """Assert that two modules have the same state dict.

    Args:
        one: First module.
        other: Second module.
        tolerance: ``rtol`` and ``atol`` of ``torch.testing.assert_close``; ``**EXACT`` for equality of every bit.
    """
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), **tolerance)


def weights_differ(one: nn.Module, other: nn.Module) -> bool:
    """Return True if any parameter differs."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return any(not torch.equal(first, second) for first, second in pairs)


# -- independent references


def sequences(batch: Any) -> Any:
    """Return input_ids, attention_mask and response_mask of a batch of any stage, [batch, time] each."""
    return getattr(batch, "sequences", batch)


@torch.no_grad()
def isolated_logprobs(lm: PreTrainedModel, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs over the vocabulary for tokens 1, 2, ... of one sequence, by the plain model.

    Args:
        lm: Language model; it is put into eval mode.
        ids: [time] token ids, without padding.
        temperature: Divides the logits.

    Returns:
        [time - 1, vocabulary], in nats.
    """
    return (lm.eval()(input_ids=ids[None]).logits[0, :-1] / temperature).log_softmax(dim=-1)


@torch.no_grad()
def isolated_score(model: ScalarModel, ids: Tensor) -> float:
    """Output of the head at the last token of one sequence, by the plain trunk. ``ids``: [time], without padding."""
    return float(model.head(model.trunk.eval()(input_ids=ids[None], use_cache=False).last_hidden_state[0, -1]))
