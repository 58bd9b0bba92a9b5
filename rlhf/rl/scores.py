"""Normalization and clipping of scores before they become rewards."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf.schema import NonNegativeFloat, PositiveFloat, check_arguments


class ScoreShaping(nn.Module):
    """Normalizes and clips scores, and applies a penalty to responses without a stop token.

        shaped = clip((score - running mean) / running std)
        for a response without a stop token: shaped - penalty, or -penalty

    The running moments cover all scores since training started, on all devices, and are stored in checkpoints. They are
    Python floats on the host, whatever the precision of the models, and exact (Chan et al. 1983, parallel algorithm).

    Args:
        subtract_mean: Subtract the running mean of all scores.
        scale_by_std: Divide by the running standard deviation of all scores, if it is not 0 (Engstrom et al. 2020,
            section 3, arXiv:2005.12729).
        clip: Largest absolute value of a shaped score, in standard deviations if ``scale_by_std`` is true and in reward
            units otherwise. null disables clipping.
        missing_eos_penalty: Penalty for a response that was cut before a stop token, in the unit of ``clip``.
        missing_eos: ``subtract`` the penalty from the shaped score, or ``replace`` the score by minus the penalty
            (Huang et al. 2024, detail 9 of PPO, arXiv:2403.17031).

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        *,
        subtract_mean: bool = True,
        scale_by_std: bool = True,
        clip: PositiveFloat | None = 5.0,
        missing_eos_penalty: NonNegativeFloat = 1.0,
        missing_eos: Literal["subtract", "replace"] = "subtract",
    ) -> None:
        super().__init__()
        check_arguments(ScoreShaping, "stage.scores", locals())
        self.subtract_mean = subtract_mean
        self.scale_by_std = scale_by_std
        self.clip = clip
        self.missing_eos_penalty = missing_eos_penalty
        self.missing_eos = missing_eos
        self.count = 0  # number of scores since training started
        self.mean = 0.0
        self.squares = 0.0  # sum of squared distances from the mean

    @property
    def std(self) -> float:
        """Running standard deviation of all scores; 0 until two different scores have been seen."""
        variance = self.squares / max(self.count, 1)
        return math.sqrt(variance) if variance > 1e-12 else 0.0  # Equal scores differ from their mean by rounding.

    def update(self, scores: Tensor) -> None:
        """Update the running moments with the scores of a rollout.

        Args:
            scores: [batch] scores of all ranks, in reward units, preferably on the CPU: they are read by the host.
        """
        values = scores.detach().cpu().double()
        mean, squares = float(values.mean()), float((values - values.mean()).square().sum())
        total, delta = self.count + len(values), mean - self.mean
        self.squares += squares + delta**2 * self.count * len(values) / total
        self.mean += delta * len(values) / total
        self.count = total

    def get_extra_state(self) -> dict[str, Any]:
        """Return the running moments, for checkpoints."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the running moments of a checkpoint."""
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])

    def forward(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Shape scores.

        Args:
            scores: [batch] scores, in reward units.
            finished: [batch] bool, True where the response ends with a stop token.

        Returns:
            [batch] shaped scores.
        """
        shaped = scores - self.mean if self.subtract_mean else scores
        if self.scale_by_std:
            shaped = shaped / (self.std or 1.0)
        if self.clip is not None:
            shaped = shaped.clamp(-self.clip, self.clip)
        unfinished = shaped if self.missing_eos == "subtract" else torch.zeros_like(shaped)
        return torch.where(finished, shaped, unfinished - self.missing_eos_penalty)
