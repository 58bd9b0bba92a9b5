"""Limits on policy updates, in addition to the clip range of PPO, and the minibatches that they skip."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.distributed import sum_over_ranks
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


class UpdateGuard:
    """Decides which minibatches are skipped, equally on all ranks.

    Args:
        limits: Limits on updates.

    Attributes:
        rollout_stopped: All further minibatches of the current rollout are skipped.
        step_is_empty: Every minibatch of the next optimizer step has been skipped so far.
    """

    def __init__(self, limits: UpdateLimits) -> None:
        self.limits = limits
        self.rollout_stopped = False
        self.step_is_empty = True

    def start_rollout(self, *, stopped: bool = False) -> None:
        """Start a new rollout, and train on its minibatches unless it is ``stopped`` from the beginning."""
        self.rollout_stopped = stopped

    def start_step(self) -> None:
        """Forget the minibatches of the previous optimizer step."""
        self.step_is_empty = True

    def accepts(self, metrics: Mapping[str, Tensor], response_tokens: int) -> bool:
        """Return whether the limits allow an update.

        A metric that is not a number exceeds no limit: ``NonfiniteGuard`` then finds the loss.

        Args:
            metrics: Update metrics of the minibatch, means over its response tokens.
            response_tokens: Number of these tokens on this rank.
        """
        if not self.rollout_stopped and self._within_limits(metrics, response_tokens):
            self.step_is_empty = False
            return True
        return False

    def _within_limits(self, metrics: Mapping[str, Tensor], response_tokens: int) -> bool:
        stop_kl, skip_ratio = self.limits.stop_kl_per_token, self.limits.skip_ratio
        if stop_kl is None and skip_ratio is None:
            return True
        measured = torch.stack([metrics["policy/approxkl_avg"], metrics["policy/ratio"]]).detach().float()
        weighted = torch.cat([measured, torch.ones_like(measured[:1])]) * response_tokens
        kl_sum, ratio_sum, tokens = sum_over_ranks(weighted).tolist()
        self.rollout_stopped = stop_kl is not None and kl_sum / tokens > stop_kl
        return not self.rollout_stopped and not (skip_ratio is not None and ratio_sum / tokens > skip_ratio)


def zero_loss(modules: Iterable[nn.Module]) -> Tensor:
    """Return a loss of 0 that depends on every trainable parameter, as distributed training requires."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    local = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters]
    return torch.stack([(parameter.flatten()[:1] * 0.0).sum().float() for parameter in local]).sum()
