"""Alerts on training metrics: a warning with advice in the log, and ``alerts/<name>`` (0 or 1) in the other loggers."""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from statistics import fmean, median
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from rlhf.logs import TextLogger
from rlhf.metrics.alert_rules import RULES
from rlhf.schema import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from rlhf.stage import StageModule
from rlhf.stage.precision import gradient_scaler

log = logging.getLogger(__name__)
MAX_HISTORY = 50  # Earlier values of a metric that are kept.
MIN_HISTORY = 10  # Values of a metric before its median or the critic's explained variance is used.


class Alerts(Callback):
    """Warns when the metrics of a stage indicate a problem. A threshold of null disables its alert.

    Args:
        max_kl_per_sequence: Largest ``objective/kl``, in nats per response, as a mean over the window.
        max_length_growth: Largest ``response/length`` relative to the first window of the run, as a mean over the
            window. The alert fires only if ``objective/scores`` have risen as well.
        max_repetition_share: Largest ``response/repetition``, the fraction of 4-grams that repeat, as a mean over the
            window.
        max_truncated_share: Largest ``response/truncated``, a fraction of responses, as a mean over the window.
        min_entropy_per_token: Smallest ``policy/entropy_avg``, in nats per token, as a mean over the window.
        min_score_range: Smallest ``objective/score_range``, in reward units, as a mean over the window.
        min_explained_variance: Smallest ``critic/explained_variance``, as a mean over the window. The first 10
            iterations are ignored, and so are those in which all returns are equal.
        max_gradient_norm_ratio: Largest ``grad_norm`` relative to the median of the previous 50. The alert needs 10
            previous values, unless the norm is not finite.
        window: Number of values in a mean, so that a single bad batch does not fire an alert. In PPO and GRPO, a value
            is an iteration.
    """

    def __init__(
        self,
        *,
        max_kl_per_sequence: PositiveFloat | None = 10.0,
        max_length_growth: PositiveFloat | None = 1.5,
        max_repetition_share: Fraction | None = 0.2,
        max_truncated_share: Fraction | None = 0.2,
        min_entropy_per_token: NonNegativeFloat | None = 0.005,
        min_score_range: NonNegativeFloat | None = 1e-6,
        min_explained_variance: float | None = 0.0,
        max_gradient_norm_ratio: PositiveFloat | None = 10.0,
        window: PositiveInt = 5,
    ) -> None:
        self.max_kl_per_sequence = max_kl_per_sequence
        self.max_length_growth = max_length_growth
        self.max_repetition_share = max_repetition_share
        self.max_truncated_share = max_truncated_share
        self.min_entropy_per_token = min_entropy_per_token
        self.min_score_range = min_score_range
        self.min_explained_variance = min_explained_variance
        self.max_gradient_norm_ratio = max_gradient_norm_ratio
        self.window = window
        self.first_values: dict[str, list[float]] = {}  # The first window of each metric.
        self.recent_values: dict[str, list[float]] = {}  # Oldest first.
        self.active: dict[str, bool] = {}
        self._seen_step = -1

    # Rules

    def thresholds(self) -> dict[str, float]:
        """Return the threshold of every enabled alert, by name."""
        thresholds = {name: getattr(self, rule.setting) for name, rule in RULES.items()}
        return {name: threshold for name, threshold in thresholds.items() if threshold is not None}

    def update(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """Add the metrics of one step.

        Returns:
            A message for each alert that fires, and an empty string for each one that does not. Alerts whose metrics
            are missing or undefined are left out.
        """
        if math.isnan(metrics.get("critic/explained_variance", 0.0)):  # It is undefined if all returns are equal.
            metrics = {name: value for name, value in metrics.items() if name != "critic/explained_variance"}
        measured = {
            name: threshold
            for name, threshold in self.thresholds().items()
            if metrics.keys() >= set(RULES[name].metrics)
        }
        for name in {metric for alert in measured for metric in RULES[alert].metrics}:
            value = float(metrics[name])
            if len(first := self.first_values.setdefault(name, [])) < self.window:
                first.append(value)
            self.recent_values[name] = [*self.recent_values.get(name, []), value][-MAX_HISTORY - 1 :]
        return {name: self._message(name, threshold) for name, threshold in measured.items()}

    def _message(self, alert: str, limit: float) -> str:
        """Return what was measured if the alert fires, otherwise an empty string."""
        metric = RULES[alert].metrics[0]
        values = self.recent_values[metric]
        if alert == "gradient_norm":
            fires = is_spike(values, limit)
            return f"{metric} is {values[-1]:.3g}, more than {limit:g} times its median" if fires else ""
        mean = recent_mean(values, self.window)
        if mean is None or (alert == "explained_variance" and len(values) < MIN_HISTORY + self.window):
            return ""
        if alert == "length":
            return self._length_message(mean, limit)
        if RULES[alert].is_minimum:
            return f"{metric} is {mean:.3g}, below {limit:g}" if not mean >= limit else ""
        return f"{metric} is {mean:.3g}, above {limit:g}" if not mean <= limit else ""

    def _length_message(self, length: float, limit: float) -> str:
        score = recent_mean(self.recent_values["objective/scores"], self.window)
        growth = length / max(fmean(self.first_values["response/length"]), 1.0)
        has_risen = score is not None and score > fmean(self.first_values["objective/scores"])
        if growth <= limit or not has_risen:
            return ""
        return f"response/length is {growth:.2f} times its initial value, and objective/scores has risen to {score:.3g}"

    # Callback hooks

    def on_train_batch_end(self, trainer: Trainer, module: StageModule, *_: Any) -> None:  # type: ignore[override]
        self._report(trainer, module)

    def on_train_epoch_end(self, trainer: Trainer, module: StageModule) -> None:  # type: ignore[override]
        self._report(trainer, module)  # The last iteration of PPO is logged after the last batch has ended.

    def _report(self, trainer: Trainer, module: StageModule) -> None:
        if module.metrics_step == self._seen_step:
            return
        self._seen_step = module.metrics_step
        metrics = dict(module.metrics)
        if gradient_scaler(trainer.precision_plugin) is not None and not math.isfinite(metrics.get("grad_norm", 0.0)):
            del metrics["grad_norm"]  # The scaler skips such steps, which is expected.
        messages = self.update(metrics)
        started = sorted(name for name, message in messages.items() if message and not self.active.get(name))
        self.active |= {name: bool(message) for name, message in messages.items()}
        if not trainer.is_global_zero:
            return
        for name in started:
            advice = f"{RULES[name].meaning} {RULES[name].change}"
            log.warning("alert %s at step %d: %s. %s", name, trainer.global_step, messages[name], advice)
        scalars = {f"alerts/{name}": float(bool(message)) for name, message in messages.items()}
        for logger in trainer.loggers:
            if scalars and not isinstance(logger, TextLogger):  # The text log already has the warnings.
                logger.log_metrics(scalars, step=trainer.global_step)

    # State of a resumed run

    def state_dict(self) -> dict[str, Any]:
        return {"first_values": self.first_values, "recent_values": self.recent_values, "active": self.active}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first_values = state_dict["first_values"]
        self.recent_values = state_dict["recent_values"]
        self.active = state_dict["active"]


def recent_mean(values: Sequence[float], window: int) -> float | None:
    """Return the mean of the last ``window`` values, or None if there are fewer."""
    return fmean(islice(reversed(values), window)) if len(values) >= window else None


def is_spike(values: Sequence[float], ratio: float, min_history: int = MIN_HISTORY) -> bool:
    """Return whether the last value is not finite, or above ``ratio`` times the median of the finite values before it.

    Args:
        values: At least one value, oldest first.
        ratio: Largest acceptable ratio of the last value to the median.
        min_history: Number of earlier finite values that a finite spike requires.
    """
    *before, last = values
    if not math.isfinite(last):
        return True
    finite = [value for value in before if math.isfinite(value)]
    return len(finite) >= min_history and last > ratio * median(finite)
