"""How on-policy stages check and call an advantage estimator."""

from functools import partial
from typing import Any

from torch import Tensor

from rlhf.declared import call_declared, declared_arguments
from rlhf.errors import ConfigError
from rlhf.rl.advantages import AdvantageEstimator


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
    function = advantage.func if isinstance(advantage, partial) else advantage
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
        ConfigError: The estimator declares an argument that is not available, or declares ``values`` and does not
            return returns.
    """
    estimate = call_declared(advantage, **available)
    if not needs_critic(advantage):
        return (estimate[0] if isinstance(estimate, tuple) else estimate), None
    if not isinstance(estimate, tuple):
        raise ConfigError(
            f"The advantage estimator {estimator_name(advantage)} declares the argument 'values', so it must return "
            "two tensors: advantages, and the returns to fit the critic to."
        )
    advantages, returns = estimate
    return advantages, returns
