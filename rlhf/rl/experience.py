"""Experience: rollouts cut into minibatches, handed out several times."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.data import Batch, BatchLoader, PromptBatch
from rlhf.data.loader import with_loss_weights
from rlhf.errors import UserError
from rlhf.sampling import Rollout
from rlhf.tensors import masked_sum


@dataclass
class Minibatch(Batch):
    """A part of a rollout to learn from. All tensors are [minibatch, time].

    tokens, mask, answer: as in Rollout.
    old_logprobs: log pi(token) when sampled, nats.
    ref_logprobs: the same under the reference, nats.
    advantages: how much better than expected, as a rule whitened over the rollout: standard deviations.
    old_values: critic's estimates when sampled, reward units; None without a critic.
    returns: what the critic should say, reward units; None without a critic.
    by_sequence: every answer counts alike in the loss, instead of every token.
    last: True on the last minibatch of a rollout: its numbers are logged then.
    fresh: tokens and sequences that are new, on the first minibatch of a rollout.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor | None = None
    returns: Tensor | None = None
    by_sequence: bool = False
    last: bool = False
    fresh: tuple[int, int] = (0, 0)

    @property
    def loss_terms(self) -> int:
        return len(self.input_ids) if self.by_sequence else int(self.response_mask.sum())

    @property
    def first(self) -> bool:
        """True on the first minibatch of a rollout."""
        return self.fresh[1] > 0

    @property
    def token_count(self) -> int:
        return self.fresh[0]

    @property
    def sequence_count(self) -> int:
        return self.fresh[1]


@dataclass
class Experience:
    """A rollout as the models see it before they learn from it. All tensors are [batch, time], 0 outside the answer.

    rollout: tokens, mask and answer.
    logprobs: log pi(token), nats.
    ref_logprobs: the same under the reference, nats.
    kl: KL to the reference at each token, nats: an estimate from the token, or the exact sum over the vocabulary.
    values: critic's estimates before the token, reward units; None without a critic.
    """

    rollout: Rollout
    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    values: Tensor | None = None

    @property
    def kl_per_sequence(self) -> Tensor:
        """Log-ratio of policy and reference of each answer, [batch], nats; its mean estimates the KL of an answer."""
        return masked_sum(self.logprobs - self.ref_logprobs, self.rollout.response_mask)


def cut(rollout: Rollout, rows: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Tokens, mask and answer of some rows, and other [batch, time] tensors, without the columns of mere padding."""
    rows = rows.to(rollout.input_ids.device)
    width = int(rollout.attention_mask[rows].sum(dim=1).max())
    tensors = (rollout.input_ids, rollout.attention_mask, rollout.response_mask, *others)
    return tuple(None if tensor is None else tensor[rows, :width] for tensor in tensors)


def partition(rows: int, size: int) -> list[Tensor]:
    """Row indices in a random order, in parts of ``size``."""
    return list(torch.randperm(rows).split(size))


class ExperienceLoader:
    """What Lightning iterates over instead of prompts: for every batch of them, all minibatches of all passes.

    A rollout is made when its first minibatch is asked for, so it is always sampled from the present policy, and each
    optimizer step is one batch of Lightning's own loop: clipping, accumulation, precision and schedules apply as ever.

    Args:
        prompts: batches of prompts.
        iterate: one iteration: a batch of prompts to its minibatches.
        minibatches: how many of them an iteration has.
    """

    def __init__(
        self, prompts: BatchLoader, iterate: Callable[[PromptBatch], Iterator[Minibatch]], minibatches: int
    ) -> None:
        if minibatches % prompts.per_step:
            raise UserError(
                f"trainer.accumulate_grad_batches={prompts.per_step} does not divide the {minibatches} minibatches of "
                "an iteration, so an optimizer step would mix two policies' answers",
                "change it, or stage.ppo_epochs, stage.minibatch_size or data.batch_size",
            )
        self.prompts = prompts
        self.iterate = iterate
        self.minibatches = minibatches
        self.batch_sampler = prompts.batch_sampler  # Lightning tells it the epoch

    def __len__(self) -> int:
        return len(self.prompts) * self.minibatches

    def __iter__(self) -> Iterator[Minibatch]:
        world = self.batch_sampler.world
        for batch in self.prompts:
            yield from with_loss_weights(self.iterate(batch), self.prompts.per_step, world)  # type: ignore[misc, arg-type]

    def state_dict(self) -> dict[str, int]:
        return self.prompts.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.prompts.load_state_dict(state)
