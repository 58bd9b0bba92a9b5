"""Preference losses of a user: the inputs they can declare, their running state, and the margins of the data."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor, nn

from harness import EXACT, PAIRS, TinyRun, one_architecture
from rlhf.data import EncodedResponse, PairBatch, SequenceBatch
from rlhf.dpo import DPOModule
from rlhf.dpo.objective import needs, sigmoid_loss
from rlhf.errors import ConfigError

BETA = 0.5


def odpo_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, *, beta: float) -> Tensor:
    """ODPO (Amini et al. 2024, arXiv:2402.10571): DPO whose margin grows with the margin of the data."""
    return -F.logsigmoid(beta * (chosen - rejected) - margins).mean()


def rdpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float, chosen_lengths: Tensor, rejected_lengths: Tensor, alpha: float
) -> Tensor:
    """R-DPO (Park et al. 2024, arXiv:2403.19159): DPO with a penalty on the difference in length."""
    penalty = alpha * (chosen_lengths - rejected_lengths)
    return -F.logsigmoid(beta * (chosen - rejected) - penalty).mean()


@needs(reference_free=False)
class BCOLoss(nn.Module):
    """BCO (Jung et al. 2024, arXiv:2404.04656): a classifier of responses, shifted by a running mean of the rewards."""

    delta: Tensor

    def __init__(self, momentum: float = 0.5) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("delta", torch.tensor(0.0))

    def forward(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        chosen, rejected = beta * chosen, beta * rejected
        if self.training:
            mean = torch.cat([chosen, rejected]).mean().detach()
            self.delta.copy_(self.momentum * self.delta + (1 - self.momentum) * mean)
        return -(F.logsigmoid(chosen - self.delta) + F.logsigmoid(self.delta - rejected)).mean()


class FixedLogprobs(DPOModule):
    """A DPO module whose policy has the given log-probs; ``source`` is not opened."""

    def __init__(self, logprobs: list[float], **keys: Any) -> None:
        super().__init__(policy=None, beta=BETA, **keys)
        self.logprobs = torch.tensor(logprobs, dtype=torch.float32)

    def response_logprobs(self, sequences: SequenceBatch) -> tuple[Tensor, Tensor]:
        return self.logprobs, torch.tensor(0.0)


def loss_by_module(loss: Callable[..., Tensor] | nn.Module) -> float:
    """The loss of two pairs as the module computes it, with beta 0.5.

    pair  chosen  rejected  margin  tokens of chosen  tokens of rejected
      1      2       -4       1            3                  1
      2     -1        1       3            2                  4
    """
    lengths = [3, 2, 1, 4]
    sequences = SequenceBatch.collate([EncodedResponse([1, *[5] * length], 1) for length in lengths])
    batch = PairBatch(sequences, ref_logprobs=torch.zeros(4), margin=torch.tensor([1.0, 3.0]))
    return float(FixedLogprobs([2, -1, -4, 1], loss=loss).loss_and_metrics(batch)[0])


def softplus(value: float) -> float:
    """ln(1 + e^value), which is -ln sigmoid(-value)."""
    return float(F.softplus(torch.tensor(value, dtype=torch.float64)))


def test_a_loss_reads_margins() -> None:
    """0.5 x 6 - 1 = 2 and 0.5 x (-2) - 3 = -4: (ln(1 + e^-2) + ln(1 + e^4)) / 2."""
    assert loss_by_module(odpo_loss) == pytest.approx((softplus(-2) + softplus(4)) / 2)


def test_a_loss_reads_lengths() -> None:
    """alpha 0.25: 0.5 x 6 - 0.25 x (3 - 1) = 2.5 and 0.5 x (-2) - 0.25 x (2 - 4) = -0.5."""
    loss = partial(rdpo_loss, alpha=0.25)
    assert loss_by_module(loss) == pytest.approx((softplus(-2.5) + softplus(0.5)) / 2)


def test_a_loss_keeps_a_running_state_in_training_only() -> None:
    """Rewards 1, -0.5, -2, 0.5 have the mean -0.25. Momentum 0.5: delta is -0.125, and then -0.1875.

    loss = mean of ln(1 + e^-(chosen - delta)) + ln(1 + e^(rejected - delta)):
    first step: chosen - delta = 1.125, -0.375; rejected - delta = -1.875, 0.625
    """
    loss = BCOLoss()
    expected = (softplus(-1.125) + softplus(0.375) + softplus(-1.875) + softplus(0.625)) / 2
    assert loss_by_module(loss) == pytest.approx(expected)
    assert float(loss.delta) == pytest.approx(-0.125)
    loss_by_module(loss)
    assert float(loss.delta) == pytest.approx(-0.1875)
    loss_by_module(loss.eval())
    assert float(loss.delta) == pytest.approx(-0.1875)


@one_architecture
def test_running_state_is_checkpointed_and_resumed(tiny_run: TinyRun) -> None:
    """A run that stops after one of two epochs and resumes ends with the weights and the state of one that does not."""
    keys: dict[str, Any] = {"learning_rate": 1e-2}
    flags = {"max_epochs": 2}
    whole = tiny_run.train("dpo", loss=BCOLoss(), trainer=flags, **keys)

    first = tiny_run.train("dpo", loss=BCOLoss(), trainer={**flags, "max_epochs": 1}, **keys)
    path = tiny_run.folder / "first.ckpt"
    first.trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state["loss.delta"] == first.module.loss.delta != 0
    second = tiny_run.train("dpo", loss=BCOLoss(), trainer=flags, resume=path, **keys)

    torch.testing.assert_close(second.weights, whole.weights, **EXACT)
    assert second.module.loss.delta != first.module.loss.delta


@one_architecture
def test_validation_does_not_change_the_running_state(tiny_run: TinyRun) -> None:
    """Runs with and without validation end with the same state."""
    path = tiny_run.write("val", PAIRS)
    with_validation = tiny_run.train("dpo", loss=BCOLoss(), data={"val": path})
    without = tiny_run.train("dpo", loss=BCOLoss())
    assert with_validation.recorder.validation_sizes
    torch.testing.assert_close(with_validation.weights, without.weights, **EXACT)


def test_a_module_loss_is_configured_without_partial() -> None:
    """``stage.loss._target_`` builds the module; ``_partial_: true`` would pass the class, which is rejected."""
    node = {"_target_": f"{__name__}.BCOLoss", "momentum": 0.9}
    loss = instantiate(node)
    assert (type(loss).__name__, loss.momentum) == ("BCOLoss", 0.9)
    with pytest.raises(ConfigError, match=r"Set stage\.loss\._partial_=false\."):
        DPOModule(policy=None, loss=instantiate({**node, "_partial_": True}))


def test_needs_works_on_classes() -> None:
    with pytest.raises(ConfigError, match=r"stage\.reference_free must be false with .*BCOLoss"):
        DPOModule(policy=None, loss=BCOLoss(), reference_free=True)


def test_an_input_that_does_not_exist_is_named() -> None:
    def loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        return chosen - rejected - margin

    with pytest.raises(ConfigError, match=r"'margin'.*\n.*margins"):
        loss_by_module(loss)


@one_architecture
@pytest.mark.parametrize(
    ("stage", "loss", "margin", "warnings"),
    [
        ("dpo", sigmoid_loss, 2.0, 1),
        ("dpo", odpo_loss, 2.0, 0),
        ("dpo", sigmoid_loss, 0.0, 0),
        ("kto", None, 2.0, 1),
    ],
)
def test_margins_that_the_loss_does_not_read_are_reported(
    tiny_run: TinyRun,
    caplog: pytest.LogCaptureFixture,
    stage: str,
    loss: Callable[..., Tensor] | None,
    margin: float,
    warnings: int,
) -> None:
    """One warning if the data have margins and the loss does not read them."""
    path = tiny_run.write("margins", [{**pair, "margin": margin} for pair in PAIRS])
    keys = {} if loss is None else {"loss": loss}
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        tiny_run.train(stage, data={"train": path}, **keys)
    assert caplog.text.count("have margins, which have no effect") == warnings


@one_architecture
def test_margins_of_the_data_reach_the_loss(tiny_run: TinyRun) -> None:
    """The first log-ratios are 0, so ODPO's first loss with margin 2 in every record is ln(1 + e^2)."""
    path = tiny_run.write("margins", [{**pair, "margin": 2.0} for pair in PAIRS])
    run = tiny_run.train("dpo", loss=odpo_loss, data={"train": path}, trainer={"max_steps": 1})
    assert run.curve("train/loss")[0] == pytest.approx(softplus(2.0), rel=1e-5)
