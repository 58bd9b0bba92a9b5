"""Minibatches that are skipped because an update limit is exceeded."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.distributed import sum_over_ranks
from rlhf.rl.update_limits import UpdateLimits


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
