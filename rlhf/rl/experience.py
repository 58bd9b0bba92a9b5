"""Experience: a rollout with everything that updates need, and its division into minibatches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.data import Batch
from rlhf.sampling import Rollout
from rlhf.tensors import masked_sum, upload


@dataclass(frozen=True)
class Lengths:
    """Lengths of the rows of a rollout as Python integers, so that later steps need not wait for the device.

    Args:
        sequences: Number of tokens of each prompt and response together.
        responses: Number of tokens of each response, including EOS.
    """

    sequences: list[int]
    responses: list[int]

    @classmethod
    def of(cls, rollout: Rollout) -> "Lengths":
        """Read the lengths of a rollout, in one transfer from its device."""
        counts = torch.stack([rollout.attention_mask.sum(dim=1), rollout.response_mask.sum(dim=1)])
        return cls(*counts.tolist())


class ModelInputs(NamedTuple):
    """Prompts with responses, as models read them.

    Attributes:
        input_ids: [rows, time] prompt and response, padded on the right.
        attention_mask: [rows, time] bool, True on real tokens.
        response_mask: [rows, time] bool, True on response tokens including EOS.
        response_tokens: Number of True entries of ``response_mask``, see ``Policy.forward``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    response_tokens: int


@dataclass
class Experience:
    """A rollout, evaluated under the weights that sampled it.

    Tensors have shape [batch, time] and are 0 on masked tokens.

    Args:
        rollout: Prompts with sampled responses.
        lengths: Lengths of its rows.
        logprobs: Log-probs under the policy, in nats.
        kl: KL to the reference model at each token, in nats; 0 without a reference model.
        ref_logprobs: Log-probs under the reference model, in nats; None without a reference model.
        values: Values of the critic before each token, in reward units; None without a critic.
    """

    rollout: Rollout
    lengths: Lengths
    logprobs: Tensor
    kl: Tensor
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None

    def finite(self) -> "Experience":
        """Return a copy with 0 in place of values that are not finite."""
        changed: dict[str, Any] = {
            item.name: torch.where(value.isfinite(), value, 0.0)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **changed)

    @property
    def kl_per_sequence(self) -> Tensor | None:
        """[batch] log-ratio of policy and reference model, summed over each response. Its mean estimates the KL.

        None without a reference model.
        """
        if self.ref_logprobs is None:
            return None
        return masked_sum(self.logprobs - self.ref_logprobs, self.rollout.response_mask)


@dataclass
class Minibatch(Batch):
    """Rows of a rollout for one gradient computation.

    Tensors have shape [minibatch, time].

    Args:
        input_ids: Prompt and response, padded on the right.
        attention_mask: bool, True on real tokens.
        response_mask: bool, True on response tokens including EOS.
        response_tokens: Number of tokens of the responses, counted before the minibatch was formed.
        old_logprobs: Log-probs under the policy that sampled the responses, in nats.
        ref_logprobs: Log-probs under the reference model, in nats; None without a reference model.
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
    response_tokens: int
    _: KW_ONLY
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    old_values: Tensor | None = None
    returns: Tensor | None = None
    terms_are_sequences: bool = False
    first: bool = False
    last: bool = False
    new_tokens: int = 0
    new_sequences: int = 0
    rollout_metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> ModelInputs:
        """What the models read."""
        return ModelInputs(self.input_ids, self.attention_mask, self.response_mask, self.response_tokens)

    def recount(self, rows: Sequence[int]) -> dict[str, int | None]:
        return {"response_tokens": int(self.response_mask[list(rows)].sum())}

    @property
    def row_count(self) -> int:
        return len(self.input_ids)

    @property
    def loss_terms(self) -> int:
        return len(self.input_ids) if self.terms_are_sequences else self.response_tokens

    @property
    def token_count(self) -> int:
        return self.new_tokens

    @property
    def sequence_count(self) -> int:
        return self.new_sequences


def select_rows(
    rollout: Rollout, lengths: Lengths, rows: Sequence[int]
) -> tuple[ModelInputs, Callable[[Tensor], Tensor]]:
    """Select rows of a rollout, trimmed to the longest sequence among them.

    Args:
        rollout: Prompts with sampled responses.
        lengths: Lengths of its rows.
        rows: Indices of the rows.

    Returns:
        The inputs of models, and a function that selects the same rows and columns of a [batch, time] tensor.
    """
    width = max(lengths.sequences[row] for row in rows)
    index = upload(rows, rollout.input_ids.device)

    def cut(tensor: Tensor) -> Tensor:
        return tensor[index, :width]

    masks = cut(rollout.attention_mask), cut(rollout.response_mask)
    return ModelInputs(cut(rollout.input_ids), *masks, sum(lengths.responses[row] for row in rows)), cut


def shuffled_split(rows: int, size: int) -> list[list[int]]:
    """Split row indices into groups of ``size``, in random order."""
    return [group.tolist() for group in torch.randperm(rows, device="cpu").split(size)]


def minibatches(
    experience: Experience,
    advantages: Tensor,
    returns: Tensor | None,
    *,
    first_split: Sequence[Sequence[int]],
    passes: int,
    terms_are_sequences: bool,
    rollout_metrics: Mapping[str, Any],
    row_numbers: Sequence[int | None] = (),
) -> Iterator[Minibatch]:
    """Yield the minibatches of several passes over a rollout, in a new random order in each pass.

    Args:
        experience: The evaluated rollout.
        advantages: [batch, time] advantages.
        returns: [batch, time] regression targets of the critic; None without a critic.
        first_split: Row indices of the minibatches of the first pass, whose size is that of the other passes.
        passes: Number of passes.
        terms_are_sequences: See ``Minibatch``.
        rollout_metrics: See ``Minibatch``.
        row_numbers: Where the prompt of each response is in the data, from 0; empty if that is not known.
    """
    rollout, lengths = experience.rollout, experience.lengths
    count = len(lengths.sequences)
    for number in range(passes):
        split = first_split if number == 0 else shuffled_split(count, len(first_split[0]))
        for position, rows in enumerate(split):
            first = number == position == 0
            inputs, cut = select_rows(rollout, lengths, rows)
            yield Minibatch(
                *inputs,
                old_logprobs=cut(experience.logprobs),
                ref_logprobs=None if experience.ref_logprobs is None else cut(experience.ref_logprobs),
                advantages=cut(advantages),
                old_values=None if experience.values is None else cut(experience.values),
                returns=None if returns is None else cut(returns),
                terms_are_sequences=terms_are_sequences,
                first=first,
                last=number == passes - 1 and position == len(split) - 1,
                new_tokens=sum(lengths.sequences) if first else 0,
                new_sequences=count if first else 0,
                rollout_metrics=rollout_metrics,
                rows=[row_numbers[row] for row in rows] if row_numbers else [],
            )
