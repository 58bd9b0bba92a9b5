"""Checks of the settings that the on-policy stages share, made before any model is loaded."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.sampling import SamplingParams
from rlhf.tensors import masked_mean, sequence_mean, sequence_sum

LossReduction: TypeAlias = Literal["token_mean", "sequence_mean", "sequence_sum"]
log = logging.getLogger(__name__)


def check_sampling(sampling: SamplingParams) -> None:
    """Refuse greedy sampling, and warn about filters."""
    if sampling.temperature == 0:
        raise ConfigError(
            "stage.sampling.temperature must be above 0 in on-policy training, got 0: greedy responses explore "
            "nothing.",
            "Set stage.sampling.temperature=0.7.",
        )
    if sampling.top_k or sampling.top_p < 1:
        log.warning(
            "stage.sampling.top_k=%s and top_p=%s restrict sampling, but log-probs, ratios and KL are computed over "
            "the full vocabulary: the responses come from a narrower distribution than the one that is updated.",
            sampling.top_k,
            sampling.top_p,
        )


def loss_reduction_function(name: str, max_new_tokens: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that reduces [batch, time] terms and their mask to a scalar loss."""
    if name == "sequence_sum":
        return partial(sequence_sum, length=max_new_tokens)
    return sequence_mean if name == "sequence_mean" else masked_mean
