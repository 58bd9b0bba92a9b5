"""How on-policy stages check and call an advantage estimator."""

from typing import Any

import torch
from torch import Tensor

from rlhf.declared import call_declared, declared_arguments, unwrapped
from rlhf.errors import ConfigError
from rlhf.rl.advantages import AdvantageEstimator
from rlhf.tensors import shape_of


def check_estimator(advantage: AdvantageEstimator, num_generations: int) -> None:
    """Refuse a number of responses per prompt that is too small for the advantage estimator."""
    if num_generations < 2 and "group_size" in declared_arguments(advantage):
        raise ConfigError(
            f"stage.num_generations must be at least 2 with the advantage estimator {estimator_name(advantage)}, "
            f"which compares the responses to one prompt, got {num_generations}.",
            "Set stage.num_generations=4 or advantage=reinforce_pp.",
        )


def estimator_name(advantage: AdvantageEstimator) -> str:
    """Return the name of an advantage estimator for messages."""
    function = unwrapped(advantage)
    return str(getattr(function, "__name__", type(function).__name__))


def needs_critic(advantage: AdvantageEstimator) -> bool:
    """Return whether an advantage estimator declares ``values``."""
    return "values" in declared_arguments(advantage)


def call_estimator(advantage: AdvantageEstimator, **available: Any) -> tuple[Tensor, Tensor | None]:
    """Call an advantage estimator with the arguments that it declares.

    Args:
        advantage: The estimator.
        available: Every argument that the stage can provide, by name. See ``rlhf.rl.advantages``.

    Returns:
        [batch, time] advantages, and [batch, time] returns if the estimator uses a critic, otherwise None.

    Raises:
        ConfigError: The estimator declares an argument that is not available, declares ``values`` and does not return
            returns, or returns tensors of another shape.
    """
    estimate = call_declared(advantage, **available)
    shape = available["response_mask"].shape
    if not needs_critic(advantage):
        advantages = estimate[0] if isinstance(estimate, tuple) else estimate
        _check_shape(advantage, "advantages", advantages, shape)
        return advantages, None
    if not isinstance(estimate, tuple):
        raise ConfigError(
            f"The advantage estimator {estimator_name(advantage)} declares the argument 'values', so it must return "
            "two tensors: advantages, and the returns to fit the critic to."
        )
    advantages, returns = estimate
    _check_shape(advantage, "advantages", advantages, shape)
    _check_shape(advantage, "returns", returns, shape)
    return advantages, returns


def _check_shape(advantage: AdvantageEstimator, name: str, result: Any, shape: torch.Size) -> None:
    if not isinstance(result, Tensor) or result.shape != shape:
        raise ConfigError(
            f"The advantage estimator {estimator_name(advantage)} must return a tensor of {name} of shape "
            f"{list(shape)}, got {shape_of(result)}.",
            "Return one number per token, [batch, time]. For one number per response, return "
            "torch.where(response_mask, scores[:, None], 0.0).",
        )
