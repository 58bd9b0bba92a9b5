"""Alerts while a stage trains: in the log, with what to turn, and in TensorBoard as ``alerts/<name>``, 0 or 1."""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from statistics import fmean, median
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from rlhf.logs import TextLogger

log = logging.getLogger(__name__)
KEPT = 50  # numbers of each kind that are remembered
EARLY = 10  # numbers before which neither a critic nor a gradient norm is judged

# what each alarm means, and what to turn: the rows of the README's troubleshooting table
ADVICE = {
    "kl": "the policy has left the reference: stage.kl_coef up, stage.learning_rate down, stage.clip_range=0.1, "
    "stage.ppo_epochs=2",
    "length": "scores rise because answers grow (reward hacking): stage.kl_coef up, fewer iterations "
    "(trainer.limit_train_batches), a reward model without length bias; compare gold",
    "repetition": "answers repeat themselves: stage.kl_coef up, stage.learning_rate down, stage.sampling.temperature=1",
    "truncation": "answers do not end: stage.scores.missing_eos_penalty up, stage.sampling.max_new_tokens up, more SFT",
    "entropy": "answers collapse to one: stage.sampling.temperature=1, stage.kl_coef up, stage.learning_rate down",
    "explained_variance": "the critic is worse than a constant, advantages are noise: stage.critic_learning_rate up, "
    "stage.value_coef up, stage.value_clip_range=null; look at val/accuracy of the reward model",
    "gradient_norm": "training is unstable: stage.learning_rate down, stage.warmup_ratio up, "
    "trainer.gradient_clip_val=1.0; look at the data of this step",
}


class Alerts(Callback):
    """Watches the numbers a stage logs. A threshold of null switches its alarm off.

    Args:
        max_kl_per_sequence: highest ``objective/kl``, nats an answer, mean of the window.
        max_length_growth: highest ``response/length`` while ``objective/scores`` have risen, times that of the first
            window of the run, mean of the window.
        max_repetition_share: highest ``response/repetition``, share of runs of 4 tokens, mean of the window.
        max_truncated_share: highest ``response/truncated``, share of answers, mean of the window.
        min_entropy_per_token: lowest ``policy/entropy_avg``, nats a token, mean of the window.
        min_explained_variance: lowest ``critic/explained_variance``, mean of the window, after the first 10 iterations.
        max_gradient_norm_ratio: highest ``grad_norm``, times the median of the 50 before it, after the first 10.
        window: numbers a mean is taken over, so that one bad batch is no alarm: iterations in PPO.
    """

    def __init__(
        self,
        *,
        max_kl_per_sequence: float | None = 10.0,
        max_length_growth: float | None = 1.5,
        max_repetition_share: float | None = 0.2,
        max_truncated_share: float | None = 0.2,
        min_entropy_per_token: float | None = 0.005,
        min_explained_variance: float | None = 0.0,
        max_gradient_norm_ratio: float | None = 10.0,
        window: int = 5,
    ) -> None:
        self.max_kl_per_sequence = max_kl_per_sequence
        self.max_length_growth = max_length_growth
        self.max_repetition_share = max_repetition_share
        self.max_truncated_share = max_truncated_share
        self.min_entropy_per_token = min_entropy_per_token
        self.min_explained_variance = min_explained_variance
        self.max_gradient_norm_ratio = max_gradient_norm_ratio
        self.window = window
        self.first: dict[str, list[float]] = {}  # the first window of each number
        self.last: dict[str, list[float]] = {}  # the newest of each number
        self.ringing: dict[str, bool] = {}

    # what sounds

    def watched(self) -> dict[str, tuple[tuple[str, ...], float]]:
        """The alarms that are on: which numbers each reads, and its threshold."""
        every = {
            "kl": (("objective/kl",), self.max_kl_per_sequence),
            "length": (("response/length", "objective/scores"), self.max_length_growth),
            "repetition": (("response/repetition",), self.max_repetition_share),
            "truncation": (("response/truncated",), self.max_truncated_share),
            "entropy": (("policy/entropy_avg",), self.min_entropy_per_token),
            "explained_variance": (("critic/explained_variance",), self.min_explained_variance),
            "gradient_norm": (("grad_norm",), self.max_gradient_norm_ratio),
        }
        return {name: (reads, limit) for name, (reads, limit) in every.items() if limit is not None}

    def hear(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        """Take in the numbers of a step; which alarms sound, each with what it saw, and "" for those that do not.

        Only alarms whose numbers are all there are named.
        """
        on = {name: (reads, limit) for name, (reads, limit) in self.watched().items() if numbers.keys() >= set(reads)}
        for name in {name for reads, _ in on.values() for name in reads}:
            value = float(numbers[name])
            if len(first := self.first.setdefault(name, [])) < self.window:
                first.append(value)
            self.last[name] = [*self.last.get(name, []), value][-KEPT - 1 :]
        return {name: self._seen(name, reads, limit) for name, (reads, limit) in on.items()}

    def _seen(self, name: str, reads: tuple[str, ...], limit: float) -> str:
        values = self.last[reads[0]]
        if name == "gradient_norm":
            return f"{reads[0]} {values[-1]:.3g}, {limit:g} times its median" if spikes(values, limit) else ""
        now = recent_mean(values, self.window)
        if now is None:
            return ""
        if name == "length":
            score, first_score = recent_mean(self.last[reads[1]], self.window), fmean(self.first[reads[1]])
            growth = now / max(fmean(self.first[reads[0]]), 1.0)
            sounds = above(growth, limit) and score is not None and score > first_score
            return f"{reads[0]} {growth:.2f} times that of the start, {reads[1]} up to {score:.3g}" if sounds else ""
        if name == "explained_variance" and len(values) < EARLY + self.window:
            return ""
        sounds = below(now, limit) if name in ("entropy", "explained_variance") else above(now, limit)
        return f"{reads[0]} {now:.3g}, limit {limit:g}" if sounds else ""

    # when

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        # plain numbers cost nothing to read; reading a tensor makes the device wait, as logging does in such steps
        logs = trainer.global_step % trainer.log_every_n_steps == 0
        if logs or not any(isinstance(value, Tensor) for value in module.numbers.values()):
            self._report(trainer, module)

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        self._report(trainer, module)  # PPO's last iteration, which logs after the batch has ended

    def _report(self, trainer: Trainer, module: Any) -> None:
        numbers, module.numbers = module.numbers, {}
        heard = self.hear(numbers)
        began = {name for name, seen in heard.items() if seen and not self.ringing.get(name)}
        self.ringing |= {name: bool(seen) for name, seen in heard.items()}
        if not trainer.is_global_zero:
            return
        for name in sorted(began):
            log.warning("alarm %s at step %d: %s. %s", name, trainer.global_step, heard[name], ADVICE[name])
        for logger in trainer.loggers:
            if heard and not isinstance(logger, TextLogger):  # the text has the warnings
                scalars = {f"alerts/{name}": float(bool(seen)) for name, seen in heard.items()}
                logger.log_metrics(scalars, step=trainer.global_step)

    # what a resumed run goes on with

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "last": self.last, "ringing": self.ringing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.last, self.ringing = state["first"], state["last"], state["ringing"]


def recent_mean(values: Sequence[float], window: int) -> float | None:
    """Mean of the newest ``window`` values, oldest first; None before there are so many."""
    return fmean(islice(reversed(values), window)) if len(values) >= window else None


def above(value: float, limit: float) -> bool:
    """Whether a number is above its limit, or no number at all."""
    return not value <= limit


def below(value: float, limit: float) -> bool:
    """Whether a number is below its limit, or no number at all."""
    return not value >= limit


def spikes(values: Sequence[float], ratio: float, early: int = EARLY) -> bool:
    """Whether the newest value is above ``ratio`` times the median of those before it, or is not finite.

    Args:
        values: oldest first, at least one.
        ratio: dimensionless.
        early: values before which a finite one is not judged.
    """
    *before, newest = values
    if not math.isfinite(newest):
        return True
    usual = [value for value in before if math.isfinite(value)]
    return len(usual) >= early and newest > ratio * median(usual)
