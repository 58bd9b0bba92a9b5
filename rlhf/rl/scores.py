"""From scores of answers to what the policy maximises."""

import torch
from torch import Tensor, nn

from rlhf.errors import UserError


class ScoreShaping(nn.Module):
    """Normalises, scales and clips scores, and charges answers that do not end.

        shaped = clip((score - running mean) / running standard deviation)
        and for an answer without a stop token: shaped - penalty, or -penalty in its place

    Args:
        subtract_mean: subtract the mean of all scores so far.
        scale_by_std: divide by the standard deviation of all scores so far.
        clip: largest size of the result, after both of the above; null for no clipping.
        missing_eos_penalty: charged for an answer that was cut before a stop token, in units of the result.
        missing_eos: ``subtract`` the penalty from the shaped score, or ``replace`` the score by minus the penalty
            (Huang et al. 2024, detail 9 of PPO, arXiv:2403.17031).

    The running moments are exact (Chan et al. 1983), are kept in checkpoints and are the same on every rank.
    Source: Engstrom et al. 2020, section 3 (arXiv:2005.12729) for scaling and clipping of rewards.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(
        self,
        *,
        subtract_mean: bool = True,
        scale_by_std: bool = True,
        clip: float | None = 5.0,
        missing_eos_penalty: float = 1.0,
        missing_eos: str = "subtract",
    ) -> None:
        super().__init__()
        if missing_eos not in ("subtract", "replace"):
            raise UserError(
                f"stage.scores.missing_eos={missing_eos} is neither subtract nor replace",
                "stage.scores.missing_eos=subtract",
            )
        if clip is not None and clip <= 0:
            raise UserError(f"stage.scores.clip={clip} would leave nothing", "stage.scores.clip=5, or null")
        self.subtract_mean = subtract_mean
        self.scale_by_std = scale_by_std
        self.clip = clip
        self.missing_eos_penalty = missing_eos_penalty
        self.missing_eos = missing_eos
        for name in ("count", "mean", "squares"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @property
    def std(self) -> Tensor:
        """Standard deviation of all scores so far; 1 before there are two that differ."""
        variance = self.squares / self.count.clamp(min=1)
        return torch.where(variance > 1e-12, variance, 1.0).sqrt()

    def update(self, scores: Tensor) -> None:
        """Take a batch of scores, [batch], into the running moments."""
        scores = scores.double()
        total = self.count + len(scores)
        delta = scores.mean() - self.mean
        self.squares += (scores - scores.mean()).square().sum() + delta.square() * self.count * len(scores) / total
        self.mean += delta * len(scores) / total
        self.count.copy_(total)

    def forward(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Shaped scores: [batch] reward units and [batch] bool to [batch]."""
        shaped = scores - self.mean.to(scores) if self.subtract_mean else scores
        if self.scale_by_std:
            shaped = shaped / self.std.to(scores)
        if self.clip is not None:
            shaped = shaped.clamp(-self.clip, self.clip)
        unfinished = shaped if self.missing_eos == "subtract" else torch.zeros_like(shaped)
        return torch.where(finished, shaped, unfinished - self.missing_eos_penalty)
