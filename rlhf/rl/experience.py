"""Experience: a rollout with everything that updates need, and its division into minibatches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.data import Batch
from rlhf.sampling import Rollout
from rlhf.tensors import masked_sum


@dataclass
class Experience:
    """A rollout, evaluated under the weights that sampled it.

    Tensors have shape [batch, time] and are 0 on masked tokens.

    Args:
        rollout: Prompts with sampled responses.
        logprobs: Log-probs under the policy, in nats.
        ref_logprobs: Log-probs under the reference model, in nats.
        kl: KL to the reference model at each token, in nats.
        values: Values of the critic before each token, in reward units; None without a critic.
    """

    rollout: Rollout
    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    values: Tensor | None = None

    @property
    def kl_per_sequence(self) -> Tensor:
        """[batch] log-ratio of policy and reference model, summed over each response. Its mean estimates the KL."""
        return masked_sum(self.logprobs - self.ref_logprobs, self.rollout.response_mask)


@dataclass
class Minibatch(Batch):
    """Rows of a rollout for one gradient computation.

    Tensors have shape [minibatch, time].

    Args:
        input_ids: Prompt and response, padded on the right.
        attention_mask: bool, True on real tokens.
        response_mask: bool, True on response tokens including EOS.
        old_logprobs: Log-probs under the policy that sampled the responses, in nats.
        ref_logprobs: Log-probs under the reference model, in nats.
        advantages: Advantages.
        old_values: Values of the critic at sampling time, in reward units; None without a critic.
        returns: Regression targets of the critic, in reward units; None without a critic.
        terms_are_sequences: The loss is a mean over sequences instead of tokens.
        first: This is the first minibatch of its rollout.
        last: This is the last minibatch of the last pass over its rollout.
        new_tokens: Tokens of the whole rollout if ``first``, otherwise 0, so that throughput counts each token once.
        new_sequences: Sequences of the whole rollout if ``first``, otherwise 0.
        rollout_metrics: Metrics of the rollout, to be logged with those of its updates.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor | None = None
    returns: Tensor | None = None
    _: KW_ONLY
    terms_are_sequences: bool = False
    first: bool = False
    last: bool = False
    new_tokens: int = 0
    new_sequences: int = 0
    rollout_metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loss_terms(self) -> int:
        return len(self.input_ids) if self.terms_are_sequences else int(self.response_mask.sum())

    @property
    def token_count(self) -> int:
        return self.new_tokens

    @property
    def sequence_count(self) -> int:
        return self.new_sequences


def select_rows(rollout: Rollout, rows: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Select rows of a rollout, trimmed to the longest sequence among them.

    Args:
        rollout: Prompts with sampled responses.
        rows: [rows] indices.
        others: Further [batch, time] tensors, or None.

    Returns:
        ``input_ids``, ``attention_mask``, ``response_mask`` and ``others`` of these rows: [rows, shorter time].
    """
    rows = rows.to(rollout.input_ids.device)
    width = int(rollout.attention_mask[rows].sum(dim=1).max())
    tensors = (rollout.input_ids, rollout.attention_mask, rollout.response_mask, *others)
    return tuple(None if tensor is None else tensor[rows, :width] for tensor in tensors)


def shuffled_split(rows: int, size: int) -> list[Tensor]:
    """Split row indices into groups of ``size``, in random order."""
    return list(torch.randperm(rows).split(size))


def minibatches(
    experience: Experience,
    advantages: Tensor,
    returns: Tensor | None,
    *,
    first_split: Sequence[Tensor],
    passes: int,
    size: int,
    terms_are_sequences: bool,
    rollout_metrics: Mapping[str, Any],
) -> Iterator[Minibatch]:
    """Yield the minibatches of several passes over a rollout, in a new random order in each pass.

    Args:
        experience: The evaluated rollout.
        advantages: [batch, time] advantages.
        returns: [batch, time] regression targets of the critic; None without a critic.
        first_split: Row indices of the minibatches of the first pass.
        passes: Number of passes.
        size: Rows of a minibatch.
        terms_are_sequences: See ``Minibatch``.
        rollout_metrics: See ``Minibatch``.
    """
    rollout = experience.rollout
    rows_of_rollout, tokens = len(rollout.input_ids), int(rollout.attention_mask.sum())
    tensors = (experience.logprobs, experience.ref_logprobs, advantages, experience.values, returns)
    for number in range(passes):
        split = first_split if number == 0 else shuffled_split(rows_of_rollout, size)
        for position, rows in enumerate(split):
            first = number == position == 0
            yield Minibatch(
                *select_rows(rollout, rows, *tensors),
                terms_are_sequences=terms_are_sequences,
                first=first,
                last=number == passes - 1 and position == len(split) - 1,
                new_tokens=tokens if first else 0,
                new_sequences=rows_of_rollout if first else 0,
                rollout_metrics=rollout_metrics,
            )
