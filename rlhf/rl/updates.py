"""Updates on minibatches of experience: loss, limits, metrics and logging."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rlhf.errors import ConfigError
from rlhf.models import PolicyOutput
from rlhf.rl.experience import Minibatch
from rlhf.rl.kl import KLController
from rlhf.rl.limits import UpdateGuard, UpdateLimits, zero_loss
from rlhf.rl.metrics import IterationMetrics, update_metrics
from rlhf.rl.models import OnPolicyModels
from rlhf.rl.objective import clipped_policy_loss
from rlhf.stage import StageModule


class UpdateModule(StageModule):
    """A stage that trains on minibatches of experience and logs once per iteration.

    Args:
        limits: Limits on updates, in addition to the clip range. None: no limits.
        optimizer: Further keywords of ``StageModule``.

    Attributes:
        guard: Decides which minibatches are skipped.
        iteration_metrics: Metrics of the current iteration.
        iterations: Number of iterations started.
        sample_rows: Prompt, response, score and any KL of the responses to show with the metrics of this iteration.
        models: The policy, and its reference model and critic if there are any.
        kl, clip_range, clip_range_high, entropy_coef, loss_reduction: The settings of ``OnPolicyModule``.
    """

    models: OnPolicyModels
    kl: KLController
    clip_range: float
    clip_range_high: float
    entropy_coef: float
    loss_reduction: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, *, limits: UpdateLimits | None = None, **optimizer: Any) -> None:
        super().__init__(**optimizer)
        self.guard = UpdateGuard(limits or UpdateLimits())
        self.iteration_metrics = IterationMetrics()
        self.iterations = 0
        self.sample_rows: Sequence[tuple[str | float, ...]] = []

    def training_step(self, minibatch: Minibatch, batch_idx: int) -> Tensor:
        if minibatch.first:
            self.iteration_metrics.rollout = minibatch.rollout_metrics
            self.guard.start_rollout(stopped=self.nonfinite.skips_rollout)
        if not self.guard.rollout_stopped:
            self.nonfinite.start_batch(minibatch)
            if self.splitter is not None:
                self.guard.step_is_empty = False
                return self.splitter.postpone(self)
            loss, metrics = self.training_loss(minibatch)
            if self.guard.accepts(metrics, minibatch.response_tokens):
                self.add_metrics(minibatch, metrics)
                return self.nonfinite.watch(loss)
        self.iteration_metrics.step.add({"policy/skipped": 1.0})
        return zero_loss(self._trained())

    def training_loss(self, minibatch: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.compute_loss(minibatch)
        return loss * minibatch.loss_weight, {**metrics, "train/loss": loss}

    def add_metrics(self, batch: Minibatch, metrics: Any) -> None:
        self.iteration_metrics.add_minibatch(batch, metrics)

    def check_splitting(self) -> None:
        super().check_splitting()
        limits = self.guard.limits
        if limits.stop_kl_per_token is not None or limits.skip_ratio is not None:
            raise ConfigError(
                "stage.on_out_of_memory=halve cannot be combined with stage.limits.stop_kl_per_token or "
                "stage.limits.skip_ratio, which are means over a whole minibatch.",
                "Set stage.on_out_of_memory=stop.",
            )

    def compute_loss(self, minibatch: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the unweighted loss of a minibatch and its metrics, ``update_metrics`` among them."""
        output, _ = self.models.update_outputs(minibatch.inputs)
        return self.policy_loss(minibatch, output)

    def policy_loss(self, minibatch: Minibatch, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of the policy on a minibatch and its metrics.

            L = L_clip - entropy_coef * mean(entropy) + kl_coef * mean(KL),    the last term only with apply_to=loss

        Args:
            minibatch: The minibatch.
            output: Output of the policy on it.
        """
        loss = surrogate = clipped_policy_loss(
            output.logprobs,
            minibatch.old_logprobs,
            minibatch.advantages,
            minibatch.response_mask,
            clip_range=self.clip_range,
            clip_range_high=self.clip_range_high,
            dual_clip=self.guard.limits.dual_clip,
            loss_reduction=self.loss_reduction,
        )
        metrics = update_metrics(minibatch, output, low=self.clip_range, high=self.clip_range_high)
        if self.entropy_coef:
            assert output.entropy is not None
            loss = loss - self.entropy_coef * self.loss_reduction(output.entropy, minibatch.response_mask)
        if self.kl.in_loss and minibatch.ref_logprobs is not None:
            kl = self.models.kl(minibatch.inputs, output, minibatch.ref_logprobs)
            metrics["loss/kl_avg"] = self.loss_reduction(kl, minibatch.response_mask)
            loss = loss + self.kl.coef * metrics["loss/kl_avg"]
        return loss, {"loss/policy_avg": surrogate, **metrics}

    def frozen_modules(self) -> list[nn.Module]:
        return self._trained() if self.guard.step_is_empty else []

    def _trained(self) -> list[nn.Module]:
        return [module for module, _ in self.trainable_modules()]

    def finish_step(self, metrics: Mapping[str, Tensor | float], *, skipped: bool) -> None:
        if self.guard.step_is_empty:  # The norm of an update that does not take place would distort the mean.
            metrics = {"lr": metrics["lr"]}
        self.guard.start_step()
        if skipped:
            self.iteration_metrics.skip_step()
        else:
            self.iteration_metrics.finish_step(metrics)

    # Logging

    def on_train_batch_end(self, outputs: Any, minibatch: Minibatch, batch_idx: int) -> None:
        if minibatch.last:
            self._log_iteration()

    def on_train_epoch_end(self) -> None:
        if self.iteration_metrics.has_updates:  # The epoch or training has ended within an iteration.
            self._log_iteration()

    def _log_iteration(self) -> None:
        """Log the metrics of a rollout and of its updates."""
        self.iteration_metrics.step.add(self.throughput())
        self.metrics, self.metrics_step = self.iteration_metrics.summarize(), self.global_step
        self.send_metrics()
        if self.sample_rows:
            names = ("prompt", "response", "score", "KL in nats")
            self.log_samples(names[: len(self.sample_rows[0])], self.sample_rows)
            self.sample_rows = []

    # Checkpoints

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of iterations, for checkpoints."""
        return {"iterations": self.iterations}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the number of iterations of a checkpoint."""
        self.iterations = int(state["iterations"])
