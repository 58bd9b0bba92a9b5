"""Skipped minibatches, metrics of updates, and loss weights of an epoch that the Trainer limits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from harness import EXACT, TinyRun, assert_same_weights, weights_differ
from rlhf.errors import TrainingError
from rlhf.ppo import PPOModule
from rlhf.rl import Minibatch, UpdateLimits
from rlhf.rl.limits import UpdateGuard
from rlhf.rl.metrics import IterationMetrics

NAN = float("nan")
TWO_MICRO_BATCHES = {"minibatch_size": 4, "ppo_epochs": 1, "trainer": {"accumulate_grad_batches": 2}}


@pytest.fixture(scope="session")
def architecture() -> str:
    """Updates do not depend on the architecture."""
    return "transformer"


def shift_old_logprobs(monkeypatch: pytest.MonkeyPatch, shifts: dict[int, float]) -> None:
    """Subtract a number from the log-probs at sampling time of some minibatches of every iteration, by position."""
    iteration = PPOModule.iteration

    def shifted_iteration(self: PPOModule, prompts: Any) -> Any:
        for number, minibatch in enumerate(iteration(self, prompts)):
            minibatch.old_logprobs = minibatch.old_logprobs - shifts.get(number, 0.0)
            yield minibatch

    monkeypatch.setattr(PPOModule, "iteration", shifted_iteration)


def test_a_skipped_micro_batch_leaves_the_others_of_its_step(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step equals one where the loss of the skipped micro-batch is 0."""
    with monkeypatch.context() as patched:
        shift_old_logprobs(patched, {1: 2.3})
        skipped = tiny_run.train("ppo", limits=UpdateLimits(skip_ratio=5.0), **TWO_MICRO_BATCHES)
    assert skipped.curve("policy/skipped") == [0.5]
    training_loss = PPOModule.training_loss

    def without_the_second(self: PPOModule, minibatch: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = training_loss(self, minibatch)
        return loss * float(minibatch.first), metrics

    monkeypatch.setattr(PPOModule, "training_loss", without_the_second)
    expected = tiny_run.train("ppo", **TWO_MICRO_BATCHES)
    assert weights_differ(skipped.module.policy.lm, tiny_run.lm)
    assert_same_weights(skipped.module, expected.module, **EXACT)


def test_a_step_whose_micro_batches_are_all_skipped_changes_nothing(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight decay and AdamW's moments stay, too."""
    shift_old_logprobs(monkeypatch, {0: 2.3, 1: 2.3})
    run = tiny_run.train("ppo", limits=UpdateLimits(skip_ratio=5.0), weight_decay=0.1, **TWO_MICRO_BATCHES)
    assert_same_weights(run.module.policy.lm, tiny_run.lm, **EXACT)
    assert run.trainer.optimizers[0].state == {}


@pytest.mark.parametrize("limits", [{"skip_ratio": 5.0}, {"stop_kl_per_token": 1.0}])
def test_a_ratio_that_is_not_a_number_is_skipped_as_a_loss_that_is_not_finite(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, limits: dict[str, float]
) -> None:
    shift_old_logprobs(monkeypatch, {1: NAN})
    keys = {"limits": UpdateLimits(**limits), "minibatch_size": 4, "ppo_epochs": 1}
    with pytest.raises(TrainingError, match="optimizer step 2: the loss is nan"):
        tiny_run.train("ppo", **keys)
    run = tiny_run.train("ppo", on_nonfinite="skip", **keys)
    assert run.curve("policy/skipped") == [0.5]
    assert all(parameter.isfinite().all() for parameter in run.module.parameters())


def test_limits_are_means_over_tokens_and_cost_nothing_if_there_are_none() -> None:
    """A guard without limits does not look at the metrics."""
    assert UpdateGuard(UpdateLimits()).accepts({}, 5)
    guard = UpdateGuard(UpdateLimits(stop_kl_per_token=0.5))
    metrics = {"policy/approxkl_avg": torch.tensor(0.5), "policy/ratio": torch.tensor(1.0)}
    assert guard.accepts(metrics, 5)
    assert not guard.accepts({**metrics, "policy/approxkl_avg": torch.tensor(0.6)}, 5)
    assert not guard.accepts(metrics, 5), "the rollout has been stopped"
    guard.start_rollout()
    assert guard.accepts(metrics, 5)


def test_update_metrics_are_weighted_means() -> None:
    """(1 x 10 + 4 x 20) / 30 = 3 over two updates; the norm of no gradients is a Python float."""
    metrics = IterationMetrics()
    metrics.step.add({"policy/ratio": torch.tensor(1.0)}, 10)
    metrics.step.add({"policy/ratio": torch.tensor(4.0), "grad_norm": 0.0}, 20)
    assert metrics.summarize() == {"policy/ratio": 3.0, "grad_norm": 0.0}
    assert metrics.summarize() == {}


def test_logged_ratios_are_means_over_the_tokens_of_an_iteration(tiny_run: TinyRun) -> None:
    """One minibatch of 8 responses, and two micro-batches of 4, log the same before the first step."""
    large = tiny_run.train("ppo", minibatch_size=8, ppo_epochs=1)
    small = tiny_run.train("ppo", **TWO_MICRO_BATCHES)
    counts = [batch.response_tokens for batch in small.batches]
    assert counts[0] != counts[1]
    for name in ("policy/entropy_avg", "loss/value_avg", "train/loss"):
        assert small.curve(name) == pytest.approx(large.curve(name), rel=1e-4)


@pytest.mark.parametrize("limit", [2, 6])
def test_a_limited_epoch_weighs_its_last_step_in_full(tiny_run: TinyRun, limit: int) -> None:
    """Four micro-batches per step: a step of the last two has the weights of these two only; they average to 1."""
    trainer = {"accumulate_grad_batches": 4, "limit_train_batches": limit}
    run = tiny_run.train("ppo", minibatch_size=2, ppo_epochs=2, trainer=trainer)
    assert len(run.batches) == limit
    tokens = [batch.response_tokens for batch in run.batches[-2:]]
    weights = [batch.loss_weight for batch in run.batches[-2:]]
    assert weights == pytest.approx([4 * count / sum(tokens) for count in tokens])


def test_an_iteration_that_the_epoch_cuts_off_is_logged(tiny_run: TinyRun) -> None:
    """4 minibatches per iteration and 3 per epoch: each of the two epochs logs its iteration, with its rollout."""
    run = tiny_run.train("ppo", ppo_epochs=2, minibatch_size=4, trainer={"max_epochs": 2, "limit_train_batches": 3})
    assert len(run.curve("objective/scores")) == 2
    assert run.trainer.global_step == 6
