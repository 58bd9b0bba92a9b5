"""Base class of all training stages: optimizer, logging, random state, and the hooks that a stage implements."""

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, RecordDataModule
from rlhf.distributed import gather_objects
from rlhf.errors import ConfigError
from rlhf.models import (
    ModelSource,
    base_weights,
    cast_frozen_matrices,
    check_complete,
    enable_gradient_checkpointing,
    limit_scan_chunks,
    shard,
)
from rlhf.schema import FractionBelowOne, NonNegativeFloat, PositiveFloat, PositiveInt
from rlhf.stage.check import Check
from rlhf.stage.epoch import prepare_epoch
from rlhf.stage.hyperparameters import check_constructors, constructor_calls, plain_arguments
from rlhf.stage.memory import BatchSplitter
from rlhf.stage.nonfinite import MAX_STEPS, NonfiniteGuard
from rlhf.stage.optimizer import LearningRateSchedule, Schedule, adamw, clip_gradients, parameter_groups
from rlhf.stage.positions import check_positions
from rlhf.stage.precision import autocast_dtype, gradient_scaler, keep_batches
from rlhf.stage.random_state import get_random_state, restore_random_state
from rlhf.stage.reporting import ReportingModule
from rlhf.stage.step_metrics import Metrics

AVERAGED = "current_model_state"  # the second entry with weights in checkpoints of Lightning's WeightAveraging


@dataclass
class Result:
    """The output of a stage, which ``rlhf.export`` writes to a file.

    Attributes:
        model: A causal language model, or a ``ScalarModel`` with its head.
        tokenizer: The tokenizer of the model.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase


class StageModule(ReportingModule):
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
        on_nonfinite: What to do if a loss, a gradient or, in PPO and GRPO, a value of a rollout is NaN or infinite:
            ``stop`` before the weights change, or ``skip`` the optimizer step and count it in
            ``train/nonfinite_steps``.
        max_nonfinite_steps: Number of consecutive optimizer steps that ``on_nonfinite=skip`` may skip. A rollout of PPO
            or GRPO whose updates are skipped counts as one step.
        on_out_of_memory: What to do if memory runs out in a training step: ``stop``, or ``halve`` the batches, now and
            for the rest of the run, and accumulate their gradients. Single process only.

    Attributes:
        monitor: Name of the metric that ``train.py`` returns, for sweeps.
        source: Where the policy comes from.
        gradient_norm: Norm of the total gradient of the current optimizer step, before clipping.
    """

    monitor: str = ""
    source: ModelSource
    gradient_norm: float

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        learning_rate: PositiveFloat,
        weight_decay: NonNegativeFloat = 0.0,
        betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999),
        eps: PositiveFloat = 1e-8,
        schedule: Schedule = "cosine",
        warmup_ratio: FractionBelowOne = 0.0,
        gradient_checkpointing: bool = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        max_nonfinite_steps: PositiveInt = MAX_STEPS,
        on_out_of_memory: Literal["stop", "halve"] = "stop",
    ) -> None:
        super().__init__()
        calls = constructor_calls(inspect.currentframe())
        check_constructors(calls)
        # For Lightning's load_from_checkpoint. The loggers do not need them: the run stores its configuration.
        self.save_hyperparameters(plain_arguments(calls), logger=False)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = (betas[0], betas[1])
        self.eps = eps
        self.gradient_checkpointing = gradient_checkpointing
        self._tokenizer = tokenizer
        self._schedule = LearningRateSchedule(schedule, warmup_ratio)
        self._models_opened = False
        self._random_states: list[dict[str, Any]] = []  # of each rank, from the checkpoint that training resumes from
        self.nonfinite = NonfiniteGuard(on_nonfinite, max_nonfinite_steps)
        self.splitter = BatchSplitter() if on_out_of_memory == "halve" else None

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
            The scalar loss multiplied by ``batch.loss_weight``, and the metrics to log, under their full names. Metrics
            are means over the terms of the loss. One that is a mean over other terms is a ``Mean``.
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
        if self.splitter is not None:
            self.check_splitting()
        # Lightning calls this hook under the device context of the strategy. There, transformers would place weights
        # itself, which requires accelerate.
        with torch.device("cpu"):
            self.open_models()
        if self._trainer is not None:
            check_positions(self, getattr(self._trainer, "datamodule", None))
            keep_batches(self._trainer.precision_plugin)
            if self._trainer.strategy.root_device.type == "cpu":
                limit_scan_chunks(self)
        self._models_opened = True
        self.strict_loading = not base_weights(self)  # Checkpoints leave out the frozen base of adapters.
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(module for module, _ in self.trainable_modules())
        dtype = None if self._trainer is None else autocast_dtype(self._trainer.precision_plugin)
        if dtype is not None:
            cast_frozen_matrices(self, dtype)
        if self.device_mesh is not None:  # trainer=fsdp
            shard(self, self.device_mesh)

    # Training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.nonfinite.start_batch(batch)
        if self.splitter is not None:
            return self.splitter.postpone(self)
        loss, metrics = self.training_loss(batch)
        self.add_metrics(batch, metrics)
        return self.nonfinite.watch(loss)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.splitter is None or not self.splitter.backward(self):
            super().backward(loss, *args, **kwargs)

    def add_metrics(self, batch: Any, metrics: Metrics) -> None:
        """Add the metrics of a training batch, or of a chunk of it, to those that are logged."""
        self.log_train(metrics, batch.loss_weight if isinstance(batch, Batch) else 1.0)

    def check_splitting(self) -> None:
        """Raise a ``ConfigError`` if batches cannot be computed in chunks with the same result."""
        if self._trainer is not None and self._trainer.world_size > 1:
            raise ConfigError(
                f"stage.on_out_of_memory=halve requires a single process, got {self._trainer.world_size}: other ranks "
                "would wait for the one that computes a step again.",
                "Set stage.on_out_of_memory=stop.",
            )

    def frozen_modules(self) -> list[nn.Module]:
        """Return the modules that the next optimizer step must not change."""
        return []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for module in self.frozen_modules():
            module.zero_grad()  # Without a gradient, the optimizer leaves weights and moments unchanged.
        metrics = self.optimizer_metrics(optimizer)
        self.gradient_norm = float(metrics["grad_norm"])
        skipped = self.nonfinite.must_skip(self, self.gradient_norm)
        if skipped:
            optimizer.zero_grad(set_to_none=True)
        self.finish_step(metrics, skipped=skipped)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm, norm=self.gradient_norm)

    def send_metrics(self) -> None:
        if self.nonfinite.skips:
            self.metrics["train/nonfinite_steps"] = float(self.nonfinite.count)
        super().send_metrics()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()  # Lightning would keep the gradients during the next forward pass.

    def configure_optimizers(self) -> Any:
        settings = {"lr": self.learning_rate, "betas": self.betas, "eps": self.eps}
        has_scaler = gradient_scaler(self.trainer.precision_plugin) is not None
        optimizer = adamw(self.trainable_modules(), self.weight_decay, has_scaler=has_scaler, **settings)
        self._configured_groups = [{**group} for group in optimizer.param_groups]
        self._configured_rate = self.learning_rate
        scheduler = self._schedule.scheduler(optimizer, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        super().on_train_start()
        self.nonfinite.writes_dumps = not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        restore_random_state(self._random_states, self.global_rank, self.trainer.world_size)
        prepare_epoch(self.trainer)
        changed = self.learning_rate != getattr(self, "_configured_rate", self.learning_rate)
        if changed:  # LearningRateFinder has set another one.
            groups = parameter_groups(self.trainable_modules(), self.weight_decay)
            for group, new in zip(self._configured_groups, groups, strict=True):
                group["lr"] = new["lr"]
        if changed or self._schedule.is_resumed:
            self._schedule.begin(self.trainer, self._configured_groups)

    def on_train_epoch_start(self) -> None:
        prepare_epoch(self.trainer)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_states"] = gather_objects(get_random_state())
        checkpoint["schedule"] = self._schedule.state_dict()
        checkpoint["nonfinite"] = self.nonfinite.state_dict()
        for weights in _stored_weights(checkpoint):
            for name in base_weights(self):
                weights.pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random_states = checkpoint.get("random_states", [])
        if "schedule" in checkpoint and checkpoint["global_step"]:
            self._schedule.load_state_dict(checkpoint["schedule"])
        if "nonfinite" in checkpoint:
            self.nonfinite.load_state_dict(checkpoint["nonfinite"])
        if not self.strict_loading:
            check_complete(self, checkpoint["state_dict"], "the checkpoint")
        if AVERAGED in checkpoint:  # The callback loads complete models only.
            own = self.state_dict()
            for weights in _stored_weights(checkpoint):
                weights.update({name: own[name] for name in base_weights(self)})


def _stored_weights(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [checkpoint[key] for key in ("state_dict", AVERAGED) if key in checkpoint]
