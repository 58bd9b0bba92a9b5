"""Responses under evaluation: of one model to a batch of prompts, and of all models to the prompts of all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor

from rlhf.data import PromptBatch
from rlhf.distributed import gather_objects
from rlhf.evaluate.metrics import ModelResponses
from rlhf.sampling import Rollout


@dataclass
class ResponseBatch:
    """Responses of one model, or of the data, to a batch of prompts. Tensors are on the CPU.

    Args:
        prompts: The prompts.
        rollout: Prompts with responses.
        texts: Responses as text.
        logprobs: [batch, time] log-probs under the model that sampled the responses, in nats; None for responses of the
            data.
        metrics: Metrics by name: a list or tensor with one value per response.
    """

    prompts: PromptBatch
    rollout: Rollout
    texts: list[str]
    logprobs: Tensor | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluation:
    """Prompts with the responses of all models.

    Args:
        prompts: Raw text of each prompt.
        targets: Reference response to each prompt; None where there is none.
        responses: Responses of each model by name.
    """

    prompts: list[str]
    targets: list[str | None]
    responses: dict[str, ModelResponses]

    @classmethod
    def of_batches(cls, batches: Sequence[PromptBatch], responses: dict[str, list[ResponseBatch]]) -> "Evaluation":
        """Join the batches of this rank."""
        joined = {name: ModelResponses() for name in responses}
        for name, model in joined.items():
            for batch in responses[name]:
                model.add(batch.texts, **batch.metrics)
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        return cls([prompt.raw_text for prompt in prompts], [prompt.target for prompt in prompts], joined)

    def gather(self, batches: Sequence[PromptBatch]) -> "Evaluation":
        """Join the prompts of all ranks, in the order in which a single process evaluates them.

        In this order, row i of a batch of rank r comes after row i of rank r - 1 and before row i + 1 of rank 0.

        Args:
            batches: The prompts of this rank, in batches.
        """
        positions = [(number, row) for number, batch in enumerate(batches) for row in range(len(batch.prompts))]
        shares = gather_objects((positions, self))
        if len(shares) == 1:
            return self
        ranks = [(*position, rank) for rank, (own, _) in enumerate(shares) for position in own]
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        parts = [share for _, share in shares if share.prompts]
        return Evaluation(
            _join((part.prompts for part in parts), order),
            _join((part.targets for part in parts), order),
            {
                name: _join_responses([part.responses[name] for part in parts], order)
                for name in parts[0].responses
                if all(name in part.responses for part in parts)
            },
        )


def _join_responses(parts: Sequence[ModelResponses], order: Sequence[int]) -> ModelResponses:
    metrics = {name: _join((part.metrics[name] for part in parts), order) for name in parts[0].metrics}
    return ModelResponses(_join((part.texts for part in parts), order), metrics)


def _join(lists: Any, order: Sequence[int]) -> list[Any]:
    """Concatenate the lists of all ranks and sort the result."""
    values = list(chain.from_iterable(lists))
    return [values[i] for i in order]
