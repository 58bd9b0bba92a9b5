"""What the Trainer and the training loader have to know of each other."""

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
