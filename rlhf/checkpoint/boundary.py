"""Positions from which a resumed run continues exactly, as entries of a checkpoint."""

import copy
from dataclasses import dataclass
from typing import Any

from lightning import LightningModule, Trainer
from torch import nn

from rlhf.stage.random_state import get_random_state


@dataclass(frozen=True)
class Boundary:
    """What a checkpoint at a resumable position holds in addition to weights and optimizer.

    If the next step fails before it changes the weights, a checkpoint of this position can still be written.

    Args:
        step: Optimizer steps taken.
        entries: Entries of the checkpoint: position in the loops and in the data, and random state.
        module_state: Entries of its ``state_dict``, such as running moments and counters.
    """

    step: int
    entries: dict[str, Any]
    module_state: dict[str, Any]

    @classmethod
    def here(cls, trainer: Trainer, module: LightningModule) -> "Boundary":
        """Return the current state of a run on a single process."""
        entries = {"loops": trainer._checkpoint_connector._get_loops_state_dict()}
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is not None:
            entries[type(datamodule).__qualname__] = datamodule.state_dict()
        state = {
            f"{name}.{nn.modules.module._EXTRA_STATE_KEY_SUFFIX}".lstrip("."): part.get_extra_state()
            for name, part in module.named_modules()
            if type(part).get_extra_state is not nn.Module.get_extra_state
        }
        random_states = {"random_states": [get_random_state()]}  # a copy already
        return cls(trainer.global_step, copy.deepcopy(entries) | random_states, copy.deepcopy(state))


def position_within_epoch(trainer: Trainer) -> dict[str, Any]:
    """Return the position of training that ends here, as entries of a checkpoint from which a longer run continues.

    Lightning counts an epoch as completed wherever training ends. With these entries, it is not, and its remaining
    batches follow. The minibatches that are left of a rollout are not used any more: its policy is gone.

    Returns:
        The entries; nothing if no batch of the epoch is left.
    """
    loop = trainer.fit_loop.epoch_loop
    ready = loop.batch_progress.current.ready
    left_of_rollout = -ready % getattr(trainer.train_dataloader, "minibatches", 1)
    if loop._num_ready_batches_reached() or ready + left_of_rollout >= trainer.num_training_batches:
        return {}
    loops = copy.deepcopy(trainer._checkpoint_connector._get_loops_state_dict())
    for counts in ("total", "current"):
        progress = loops["fit_loop"]["epoch_loop.batch_progress"][counts]
        progress |= {name: count + left_of_rollout for name, count in progress.items()}
    return {"loops": loops, "epoch": trainer.current_epoch}
