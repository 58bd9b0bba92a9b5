"""Base class of all training stages: optimizer, logging, random state, and the hooks that a stage implements."""

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeAlias

import lightning
import torch
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.check import Check
from rlhf.data import Batch, RecordDataModule
from rlhf.errors import ConfigError
from rlhf.models import ModelSource, enable_gradient_checkpointing
from rlhf.stage.optimizer import SCHEDULES, learning_rate_schedule, parameter_groups
from rlhf.stage.random_state import get_random_state, set_random_state
from rlhf.stage.sample_table import markdown_table
from rlhf.stage.throughput import ThroughputMeter

PLAIN = (bool, int, float, str, type(None))  # Types that checkpoints can hold without pickle.
Metrics: TypeAlias = Mapping[str, Tensor | float]


@dataclass
class Result:
    """The output of a stage, which ``rlhf.export`` writes to a file.

    Attributes:
        model: A causal language model, or a ``ScalarModel`` with its head.
        tokenizer: The tokenizer of the model.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase


class StageModule(lightning.LightningModule):
    """Base class of the training stages.

    A stage sets ``source``, opens its models in ``open_models``, and implements ``training_loss`` and ``result``.

    Args:
        tokenizer: The tokenizer of data and models. null: the tokenizer of ``policy``.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW weight decay of matrices. Norm weights and biases are not decayed.
        betas: AdamW decay rates of the first and second moment.
        eps: AdamW epsilon.
        schedule: Learning rate schedule: ``cosine`` or ``linear`` decay to 0, or ``constant``.
        warmup_ratio: Fraction of all optimizer steps over which the learning rate rises linearly from 0.
        gradient_checkpointing: Recompute the activations of each layer in the backward pass instead of storing them.
            This takes less memory and about one more forward pass per step.

    Attributes:
        monitor: Name of the metric that ``train.py`` returns, for sweeps.
        source: Where the policy comes from.
        metrics: The training metrics logged most recently. Callbacks may read them and must not change them.
        metrics_step: The optimizer step that ``metrics`` belong to. -1 until the first step is complete.
    """

    monitor: str = ""
    source: ModelSource

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        learning_rate: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: str = "cosine",
        warmup_ratio: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ConfigError(
                f"stage.schedule must be one of {', '.join(SCHEDULES)}, got {schedule}.", "Set stage.schedule=cosine."
            )
        if not 0 <= warmup_ratio < 1:
            raise ConfigError(
                f"stage.warmup_ratio must be at least 0 and below 1, got {warmup_ratio}.",
                "Set stage.warmup_ratio=0.05.",
            )
        # Lightning's load_from_checkpoint passes these to the constructor again. The loggers do not need them: the
        # run stores its complete configuration.
        self.save_hyperparameters(_plain_arguments(inspect.currentframe()), logger=False)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = (betas[0], betas[1])
        self.eps = eps
        self.schedule = schedule
        self.warmup_ratio = warmup_ratio
        self.gradient_checkpointing = gradient_checkpointing
        self.metrics: dict[str, Tensor | float] = {}
        self.metrics_step = -1
        self._tokenizer = tokenizer
        self._meter = ThroughputMeter()
        self._models_opened = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of data and models."""
        if self._tokenizer is None:
            self._tokenizer = self.source.tokenizer(())
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    # Hooks of a stage

    @abstractmethod
    def training_loss(self, batch: Any) -> tuple[Tensor, Metrics]:
        """Compute the loss of a training batch without logging.

        Pre-flight checks call this method as well, so everything that the gradient depends on belongs here.

        Returns:
            The scalar loss multiplied by ``batch.loss_weight``, and the metrics to log, under their full names.
        """

    @abstractmethod
    def open_models(self) -> None:
        """Open all models of the stage, in float32 on the CPU. ``configure_model`` calls this once."""

    @abstractmethod
    def result(self) -> Result:
        """Return the trained model for export."""

    @classmethod
    def unused_inputs(cls, settings: Mapping[str, Any]) -> set[str]:
        """Return the inputs that these settings make unnecessary. They are opened only if they are set explicitly.

        Args:
            settings: The keywords that the module will be built with, without its inputs.
        """
        return set()

    def preflight_checks(self, datamodule: RecordDataModule) -> Iterator[Check]:
        """Run the stage's pre-flight checks (``check=true``) on its models and data."""
        yield from ()

    def trainable_modules(self) -> Iterator[tuple[nn.Module, float]]:
        """Yield each module to train with its learning rate."""
        yield self, self.learning_rate

    # Models

    def configure_model(self) -> None:
        if self._models_opened:
            return
        # Lightning calls this hook under the device context of the strategy. There, transformers would place weights
        # itself, which requires accelerate.
        with torch.device("cpu"):
            self.open_models()
        self._models_opened = True
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(module for module, _ in self.trainable_modules())

    # Training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, metrics = self.training_loss(batch)
        self.log_train(metrics)
        return loss

    def configure_optimizers(self) -> Any:
        # Lightning refuses to clip the gradients of a fused optimizer under any mixed precision, with or without a
        # gradient scaler. None lets PyTorch choose among its other implementations.
        fused = None if isinstance(self.trainer.precision_plugin, MixedPrecision) else True
        groups = parameter_groups(self.trainable_modules(), self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=fused)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = learning_rate_schedule(optimizer, self.schedule, warmup_ratio=self.warmup_ratio, steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        self._meter = ThroughputMeter()
        self.restore_random_state()
        loader: Any = self.trainer.train_dataloader
        if hasattr(loader, "limit_epoch"):
            loader.limit_epoch(int(self.trainer.num_training_batches))
        if self.global_rank:  # Ranks must sample different responses.
            torch.manual_seed(int(torch.randint(2**31, ())) + self.global_rank)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, Batch):
            self._meter.add(batch.token_count, batch.sequence_count)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log_train({**self.optimizer_metrics(optimizer), **self.throughput()})
        self.metrics_step = self.global_step

    # Logging

    def log_train(self, metrics: Metrics) -> None:
        """Log metrics of a training step under their full names."""
        for name, value in metrics.items():
            self.metrics[name] = value.detach() if isinstance(value, Tensor) else value
        self.log_dict(dict(metrics), on_step=True, on_epoch=False, batch_size=1)

    def log_val(self, metrics: Metrics, weight: int) -> None:
        """Log metrics of a validation batch under ``val/``.

        Args:
            metrics: Names and values. The value of an epoch is the weighted mean over its batches.
            weight: Number of terms that the values are means over.
        """
        names = {f"val/{name}": value for name, value in metrics.items()}
        self.log_dict(names, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True)

    def log_samples(self, samples: Sequence[tuple[str, str]], name: str = "samples") -> None:
        """Show (prompt, response) pairs as a table in TensorBoard's text tab."""
        table = markdown_table(("prompt", "response"), samples)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(name, table, self.global_step)

    def optimizer_metrics(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor | float]:
        """Return the norm of the total gradient before clipping, and the learning rate."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return {"grad_norm": nn.utils.get_total_norm(gradients), "lr": optimizer.param_groups[0]["lr"]}

    def throughput(self) -> dict[str, float]:
        """Return tokens and sequences per second over all devices since the previous call."""
        return self._meter.rates(self.trainer.world_size)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = get_random_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random_state = checkpoint.get("random_state")

    def restore_random_state(self) -> None:
        """Restore the random state of the checkpoint that training resumes from, if there is one."""
        state = getattr(self, "_random_state", None)
        if state is not None:
            set_random_state(state)


def _plain_arguments(frame: FrameType | None) -> dict[str, Any]:
    """Return the constructor arguments that are numbers, strings, booleans, None, or sequences of these.

    Models, functions and settings objects are left out: a checkpoint that contained them could not be opened with
    ``torch.load(weights_only=True)``.

    Args:
        frame: Frame of the base class's ``__init__``. The arguments of subclasses are found from there.
    """
    assert frame is not None, "this Python implementation has no stack frames"
    plain: dict[str, Any] = {}
    for arguments in collect_init_args(frame, [], classes=(HyperparametersMixin,)):
        for name, value in arguments.items():
            if isinstance(value, Sequence) and not isinstance(value, str):
                value = list(value)  # From Hydra, it is a ListConfig, which would be pickled.
            if all(isinstance(item, PLAIN) for item in (value if isinstance(value, list) else [value])):
                plain[name] = value
    return plain
