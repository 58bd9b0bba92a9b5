"""AdamW and its learning rate schedule, as every training stage uses them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

SCHEDULES = ("cosine", "linear", "constant")


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


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, schedule: str, *, warmup_ratio: float, steps: int
) -> LRScheduler:
    """Return a schedule with linear warmup, to be advanced once per optimizer step.

    Args:
        optimizer: The optimizer to schedule.
        schedule: ``cosine`` or ``linear`` decay to 0, or ``constant``.
        warmup_ratio: Fraction of ``steps`` over which the learning rate rises from 0.
        steps: Number of optimizer steps.
    """
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler: LRScheduler = get_scheduler(name, optimizer, int(warmup_ratio * steps), steps)
    return scheduler
