"""Checks of the settings that the on-policy stages share, made before any model is loaded."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.sampling import SamplingParams
from rlhf.tensors import masked_mean, sequence_mean, sequence_sum

LossReduction: TypeAlias = Literal["token_mean", "sequence_mean", "sequence_sum"]
LOSS_REDUCTIONS = get_args(LossReduction)
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


def check_collection(rollout_batch_size: int | None, samples: int, sample_interval: int) -> None:
    """Refuse sizes of rollouts and sample tables that are out of range."""
    if rollout_batch_size is not None and rollout_batch_size < 1:
        raise ConfigError(
            f"stage.rollout_batch_size must be at least 1 or null, got {rollout_batch_size}.",
            "Set stage.rollout_batch_size=64 or remove it.",
        )
    if samples < 0:
        raise ConfigError(f"stage.samples must be >= 0, got {samples}.", "Set stage.samples=4.")
    if sample_interval < 1:
        raise ConfigError(
            f"stage.sample_interval must be at least 1, got {sample_interval}.", "Set stage.sample_interval=10."
        )


def check_update(
    clip_range: float,
    clip_range_high: float | None,
    loss_reduction: str,
    ppo_epochs: int,
    minibatch_size: int,
) -> None:
    """Refuse values that are out of range."""
    if loss_reduction not in LOSS_REDUCTIONS:
        raise ConfigError(
            f"stage.loss_reduction must be one of {', '.join(LOSS_REDUCTIONS)}, got {loss_reduction}.",
            "Set stage.loss_reduction=token_mean.",
        )
    if ppo_epochs < 1:
        raise ConfigError(f"stage.ppo_epochs must be at least 1, got {ppo_epochs}.", "Set stage.ppo_epochs=1.")
    if minibatch_size < 1:
        raise ConfigError(
            f"stage.minibatch_size must be at least 1, got {minibatch_size}.", "Set stage.minibatch_size=1."
        )
    if clip_range <= 0:
        raise ConfigError(f"stage.clip_range must be positive, got {clip_range}.", "Set stage.clip_range=0.2.")
    if clip_range_high is not None and clip_range_high <= 0:
        raise ConfigError(
            f"stage.clip_range_high must be positive, got {clip_range_high}.",
            "Set stage.clip_range_high=0.28 or remove it.",
        )
