"""The training data loader of on-policy stages: batches of prompts in, minibatches of experience out."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, cast

from rlhf.data import BatchLoader, PromptBatch
from rlhf.data.loader import with_loss_weights
from rlhf.errors import ConfigError
from rlhf.rl.experience import Minibatch


class ExperienceLoader:
    """Turns each batch of prompts into the minibatches of one iteration.

    A rollout is sampled when its first minibatch is requested, hence always from the current policy. Lightning sees
    minibatches as ordinary batches, so gradient clipping, accumulation, precision and schedules work as in any stage.

    Args:
        prompts: Batches of prompts.
        iteration: Runs one iteration: a batch of prompts in, minibatches out.
        minibatches: Number of minibatches of an iteration, over all passes.

    Raises:
        ConfigError: An optimizer step would mix minibatches of two iterations.
    """

    def __init__(
        self, prompts: BatchLoader, iteration: Callable[[PromptBatch], Iterator[Minibatch]], minibatches: int
    ) -> None:
        self.prompts = prompts
        self.iteration = iteration
        self.minibatches = minibatches
        self.per_step = prompts.per_step
        self._check_steps()
        self.batch_sampler = prompts.batch_sampler  # Lightning sets its epoch.
        self._last_minibatches = minibatches  # of the last iteration of an epoch; fewer if the Trainer limits them

    def _check_steps(self) -> None:
        if self.minibatches % self.per_step:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={self.per_step} must divide the number of minibatches per "
                f"iteration, {self.minibatches}: an optimizer step cannot mix responses of two policies.",
                "Change it, or stage.ppo_epochs, stage.minibatch_size or data.batch_size.",
            )

    def __len__(self) -> int:
        return len(self.prompts) * self.minibatches

    def __iter__(self) -> Iterator[Minibatch]:
        world = self.batch_sampler.world
        for batch in self.prompts:
            is_last = self.prompts.state_dict()["position"] == 0
            minibatches = islice(
                self.iteration(cast(PromptBatch, batch)), self._last_minibatches if is_last else self.minibatches
            )
            weighted = with_loss_weights(minibatches, self.per_step, world)
            yield from cast(Iterator[Minibatch], weighted)

    def limit_epoch(self, batches: int, per_step: int) -> None:
        """Set the minibatches of an epoch and of an optimizer step, see ``BatchLoader.limit_epoch``."""
        self.per_step = per_step
        self._check_steps()
        iterations = -(-batches // self.minibatches)
        self._last_minibatches = batches - (iterations - 1) * self.minibatches
        self.prompts.limit_epoch(iterations, 1)

    @property
    def start(self) -> int | None:
        """The number of minibatches that count as done after resuming, see ``BatchLoader.start``."""
        start = self.prompts.start
        return None if start is None else start * self.minibatches

    def state_dict(self) -> dict[str, Any]:
        return self.prompts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prompts.load_state_dict(state)
