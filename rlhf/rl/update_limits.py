"""Limits on policy updates, in addition to the clip range of PPO."""

from dataclasses import dataclass
from typing import Annotated

from rlhf.schema import PositiveFloat, check_arguments


@dataclass(frozen=True)
class UpdateLimits:
    """Limits on policy updates. null disables a limit.

    Args:
        dual_clip: Largest loss of a token with negative advantage, as a multiple of its absolute advantage. Above 1;
            the paper uses 3 (Ye et al. 2020, eq. 4, arXiv:1912.09729).
        stop_kl_per_token: Approximate KL between the current policy and the policy that sampled the responses, in nats
            per token, above which training on the rollout stops: the minibatch that exceeds it and all later ones are
            skipped. The KL is half the mean squared log-ratio of a minibatch (early stopping in the published code of
            Schulman et al. 2017, which stops at 1.5 * 0.01).
        skip_ratio: Mean probability ratio above which a minibatch is skipped. Above 1; TRL 0.9.6 uses 10.

    Raises:
        ConfigError: A value is out of range.
    """

    dual_clip: Annotated[float, "> 1"] | None = None
    stop_kl_per_token: PositiveFloat | None = None
    skip_ratio: Annotated[float, "> 1"] | None = None

    def __post_init__(self) -> None:
        check_arguments(type(self), "stage.limits", vars(self))
