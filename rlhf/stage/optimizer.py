"""AdamW and its learning rate schedule, as every training stage uses them."""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from rlhf.errors import ConfigError
from rlhf.stage.epoch import remaining_steps

log = logging.getLogger(__name__)
Schedule: TypeAlias = Literal["cosine", "linear", "constant"]


def parameter_groups(modules: Iterable[tuple[nn.Module, float]], weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups of the trainable parameters, with weight decay for matrices only.

    Args:
        modules: Each module to train with its learning rate.
        weight_decay: Weight decay of parameters with two or more dimensions. Norm weights and biases are not decayed.
    """
    groups = []
    for module, learning_rate in modules:
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trainable if parameter.ndim > 1]
        vectors = [parameter for parameter in trainable if parameter.ndim <= 1]
        for parameters, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if parameters:
                groups.append({"params": parameters, "lr": learning_rate, "weight_decay": decay})
    return groups


def adamw(
    modules: Iterable[tuple[nn.Module, float]], weight_decay: float, *, has_scaler: bool, **settings: Any
) -> AdamW:
    """Return AdamW, fused unless a gradient scaler multiplies the loss.

    A fused optimizer would divide the gradients by the factor of the scaler after their norm has been computed.

    Args:
        modules: See ``parameter_groups``.
        weight_decay: See ``parameter_groups``.
        has_scaler: Whether there is a gradient scaler.
        settings: Further arguments of AdamW.
    """
    # None lets PyTorch choose among its other implementations.
    return AdamW(parameter_groups(modules, weight_decay), fused=None if has_scaler else True, **settings)


def clip_gradients(optimizer: Optimizer, limit: float | None, algorithm: str | None, *, norm: float) -> None:
    """Clip gradients whose norm is known.

    Lightning would compute the norm again, and multiply gradients below the limit by 1.

    Args:
        optimizer: The optimizer of the parameters.
        limit: Largest norm, or largest absolute value of a gradient. None or 0: nothing is clipped.
        algorithm: ``norm``, which is also the meaning of None, or ``value``.
        norm: Norm of the total gradient.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if limit and algorithm == "value":
        nn.utils.clip_grad_value_(parameters, limit)
    elif limit and norm > limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, torch.full((), norm, device=parameters[0].device))


def set_hyperparameters(scheduler: LRScheduler, configured: Iterable[dict[str, Any]]) -> None:
    """Apply this run's settings to an optimizer, such as one restored from a checkpoint.

    Args:
        scheduler: The scheduler of the optimizer.
        configured: The parameter groups with the settings of this run.
    """
    for index, (group, settings) in enumerate(zip(scheduler.optimizer.param_groups, configured, strict=True)):
        group.update({key: settings[key] for key in ("weight_decay", "betas", "eps")})
        group["initial_lr"] = scheduler.base_lrs[index] = settings["lr"]


def relative_rate(step: float, *, name: str, warmup: int, steps: float) -> float:
    """Return the learning rate relative to its peak, as ``transformers.get_scheduler`` does.

    The module of that function imports peft, which takes 0.4 s at every start.

    Args:
        step: Number of optimizer steps so far.
        name: ``cosine`` or ``linear`` decay to 0, or ``constant``.
        warmup: Number of steps over which the learning rate rises from 0.
        steps: Number of all steps.
    """
    if step < warmup:
        return step / warmup
    left = max(steps - step, 0) / max(steps - warmup, 1)
    return {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}[name]


class LearningRateSchedule:
    """The learning rate over the optimizer steps of a run: linear warmup, then the chosen schedule.

    A resumed run continues its schedule. If its remaining epochs now take another number of steps, because the batches
    or the number of processes have changed, these steps cover the rest of the schedule. If the run is to be longer or
    shorter than before, the schedule starts again and covers the remaining steps.

    Args:
        name: ``cosine`` or ``linear`` decay to 0, or ``constant``.
        warmup_ratio: Fraction of the steps over which the learning rate rises from 0.
    """

    def __init__(self, name: str, warmup_ratio: float) -> None:
        self.name = name
        self.warmup_ratio = warmup_ratio
        self.start = 0.0  # Optimizer step at which the schedule starts; negative if its rest takes more steps now.
        self.end = 0  # Optimizer step at which the schedule and training end.
        self.limits: list[int | None] = []  # ``max_epochs`` and ``max_steps`` of the Trainer.
        self._resumed: dict[str, Any] = {}  # the state in the checkpoint that training resumes from

    @property
    def is_resumed(self) -> bool:
        return bool(self._resumed)

    def scheduler(self, optimizer: Optimizer, trainer: Any) -> LambdaLR:
        """Return the scheduler of an optimizer, to be advanced once per optimizer step.

        Args:
            optimizer: The optimizer.
            trainer: The Trainer of the run.

        Raises:
            ConfigError: The run has no end.
        """
        end = trainer.estimated_stepping_batches
        if not math.isfinite(end):
            raise ConfigError(
                "The learning rate schedule covers the whole run, but neither trainer.max_epochs nor trainer.max_steps "
                "ends it.",
                "Set trainer.max_epochs or trainer.max_steps. trainer.max_time may end the run earlier.",
            )
        self.end = int(end)
        self.limits = [trainer.max_epochs, trainer.max_steps]
        return LambdaLR(optimizer, self.rate)

    def rate(self, step: int) -> float:
        """Return the learning rate of an optimizer step relative to its peak."""
        steps = max(self.end - self.start, 1)
        return relative_rate(step - self.start, name=self.name, warmup=int(self.warmup_ratio * steps), steps=steps)

    def begin(self, trainer: Any, configured: Sequence[dict[str, Any]]) -> None:
        """Apply the settings of this run if it is resumed, or if ``LearningRateFinder`` has set another learning rate.

        Args:
            trainer: The Trainer at the start of training.
            configured: The parameter groups with the settings of this run.

        Raises:
            ConfigError: ``LearningRateFinder`` searches in a run that is resumed.
        """
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        if not isinstance(scheduler, LambdaLR):  # LearningRateFinder trains with another scheduler while it searches.
            raise ConfigError(
                "LearningRateFinder must not be used in a run that is resumed: it would start again at step 0.",
                "Remove it from callbacks, and set stage.learning_rate=<number>, as in the log, and resume=force.",
            )
        set_hyperparameters(scheduler, configured)
        step = trainer.global_step
        if self.is_resumed:
            self.resume(scheduler, step, step + remaining_steps(trainer))
        else:
            self._set_rates(scheduler, step)

    def resume(self, scheduler: LambdaLR, step: int, end: int) -> None:
        """Continue the schedule of the checkpoint that training resumes from.

        Args:
            scheduler: The scheduler, whose optimizer has been restored.
            step: Number of optimizer steps taken.
            end: Number of optimizer steps at the end of training.
        """
        previous_start, previous_end = self._resumed["start"], self._resumed["end"]
        self.start, self.end = previous_start, end
        if end != previous_end:
            left = (previous_end - step) / max(previous_end - previous_start, 1)  # fraction of the schedule
            continues = left > 0 and self._resumed.get("limits") == self.limits
            self.start = end - (end - step) / left if continues else step
            log.warning(
                "The run had %d optimizer steps when its checkpoint was written, and now it has %d. The learning rate "
                "schedule %s step %d and covers the remaining steps.",
                previous_end,
                end,
                "continues at" if continues else "starts again at",
                step,
            )
        self._set_rates(scheduler, step)

    def _set_rates(self, scheduler: LambdaLR, step: int) -> None:
        scheduler.last_epoch = step
        for group, peak in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = peak * self.rate(step)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "end": self.end, "limits": self.limits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state in a checkpoint."""
        self._resumed = state
