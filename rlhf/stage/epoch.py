"""Keep the Trainer and the training loader in agreement about where epochs and steps end."""

import math
from typing import Any


def prepare_epoch(trainer: Any) -> None:
    """Tell the loader where the Trainer ends epochs and optimizer steps, and the Trainer where a resumed epoch begins.

    Args:
        trainer: The Trainer, at the start of training or of an epoch.
    """
    loader = trainer.train_dataloader
    if not hasattr(loader, "limit_epoch"):
        return
    loader.batch_sampler.set_epoch(trainer.current_epoch)
    loader.limit_epoch(int(trainer.num_training_batches), trainer.accumulate_grad_batches)
    if (start := loader.start) is None:
        return
    progress = trainer.fit_loop.epoch_loop.batch_progress
    unfinished = progress.current.processed - progress.current.completed  # 1 if it was saved in on_train_batch_end
    progress.current.ready = progress.current.started = progress.current.processed = start
    progress.current.completed = start - unfinished


def remaining_steps(trainer: Any) -> int:
    """Return the number of optimizer steps until the end of training.

    Args:
        trainer: The Trainer at the start of training, after ``prepare_epoch``.
    """
    limits: list[int] = [trainer.max_steps - trainer.global_step] if trainer.max_steps != -1 else []
    if trainer.max_epochs not in (None, -1):
        per_step = trainer.accumulate_grad_batches
        progress = trainer.fit_loop.epoch_loop.batch_progress
        done = 0 if progress.is_last_batch else progress.current.ready  # batches of the current epoch
        per_epoch = math.ceil(trainer.num_training_batches / per_step)
        limits.append((trainer.max_epochs - trainer.current_epoch) * per_epoch - done // per_step)
    return max(min(limits), 0)
