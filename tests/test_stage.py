"""What every training stage does the same way: schedule, optimizer, random state, gradient norm."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.stage import Result, StageModule


class Tiny(StageModule):
    """A matrix and a vector; draws a random number at each step."""

    def __init__(self, *, slope: float = 0.0, **optimizer: Any) -> None:
        super().__init__(**{"learning_rate": 0.1, "schedule": "constant", **optimizer})
        self.linear = nn.Linear(2, 2)
        nn.init.ones_(self.linear.weight)
        nn.init.ones_(self.linear.bias)
        self.slope = slope
        self.rates: list[float] = []
        self.draws: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.draws.append(float(torch.rand(())))
        return self.slope * (self.linear.weight.sum() + self.linear.bias.sum())

    def result(self) -> Result:
        raise NotImplementedError


class Batches:
    """So many batches, all the same; a DataLoader would draw random numbers of its own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.zeros(self.count, 1)


def fit(module: Tiny, *, steps: int = 1, resume: Path | None = None, **trainer: Any) -> lightning.Trainer:
    """Train on so many batches an epoch, all the same."""
    fitted = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **trainer},
    )
    fitted.fit(module, Batches(steps), ckpt_path=resume, weights_only=True)
    return fitted


def test_linear_schedule_rises_from_0_and_falls_to_0() -> None:
    """10 steps, a fifth of them warm-up: 0, 1/2, then (10 - k) / 8 of 0.1; after the last step it is 0."""
    module = Tiny(schedule="linear", warmup_ratio=0.2)
    trainer = fit(module, steps=10)
    assert module.rates == pytest.approx([0.1 * x for x in (0, 1 / 2, *((10 - k) / 8 for k in range(2, 10)))])
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


def test_cosine_schedule_falls_to_0() -> None:
    """(1 + cos(pi k / 8)) / 2 of 0.1 at step k of 8; after the last step it is 0."""
    module = Tiny(schedule="cosine")
    trainer = fit(module, steps=8)
    assert module.rates == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)


def test_constant_schedule_stays_after_its_warm_up() -> None:
    """4 steps, half of them warm-up: 0, 1/2, 1, 1 of 0.1."""
    module = Tiny(schedule="constant", warmup_ratio=0.5)
    fit(module, steps=4)
    assert module.rates == pytest.approx([0.0, 0.05, 0.1, 0.1])


def test_a_schedule_is_counted_in_optimizer_steps() -> None:
    """8 batches, 2 a step, twice: 8 steps of the schedule, each rate used for two batches."""
    module = Tiny(schedule="linear")
    trainer = fit(module, steps=8, accumulate_grad_batches=2, max_epochs=2)
    assert trainer.global_step == 8
    assert module.rates == pytest.approx([0.1 * (8 - k // 2) / 8 for k in range(16)])


def test_weight_decay_is_of_matrices_only() -> None:
    """Gradient 0, learning rate 0.1, decay 0.5: AdamW multiplies the matrix by 1 - 0.05, and leaves the vector."""
    module = Tiny(weight_decay=0.5)
    fit(module)
    torch.testing.assert_close(module.linear.weight, torch.full((2, 2), 0.95), check_dtype=True)
    assert module.linear.bias.tolist() == [1.0, 1.0]


def test_logged_gradient_norm_is_that_before_clipping() -> None:
    """d loss / d parameter = 3 for each of 6 numbers: norm 3 sqrt(6), clipped or not; the learning rate beside it."""
    for clip in (None, 0.5):
        trainer = fit(Tiny(slope=3.0), gradient_clip_val=clip)
        assert float(trainer.callback_metrics["grad_norm"]) == pytest.approx(3 * 6**0.5)
        assert float(trainer.callback_metrics["lr"]) == pytest.approx(0.1)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("by_plugin", [False, True], ids=["trainer.precision", "trainer.plugins"])
def test_gradients_are_clipped_under_mixed_precision(precision: str, by_plugin: bool) -> None:
    """Lightning refuses to clip the gradients of a fused optimizer there; 3 for each of 6 numbers becomes norm 0.5."""
    scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
    plugin = lightning.pytorch.plugins.MixedPrecision(precision, "cpu", scaler)
    chosen = {"plugins": [plugin]} if by_plugin or scaler else {"precision": precision}
    trainer = fit(module := Tiny(slope=3.0), steps=2, gradient_clip_val=0.5, **chosen)
    assert trainer.global_step == 2
    assert float(trainer.callback_metrics["grad_norm"]) == pytest.approx(3 * 6**0.5)
    assert float(nn.utils.get_total_norm([p.grad for p in module.parameters()])) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_optimizer_is_fused_without_mixed_precision(precision: str) -> None:
    """And only there: with it, PyTorch chooses among the other implementations."""
    assert fit(Tiny(), precision=precision).optimizers[0].defaults["fused"] is True
    assert fit(Tiny(), precision="bf16-mixed").optimizers[0].defaults["fused"] is None


def test_parts_may_have_learning_rates_of_their_own() -> None:
    """A frozen parameter is not in the optimizer, and each part's rate reaches its groups."""

    class Two(Tiny):
        def trainable_modules(self) -> Any:
            yield nn.ParameterList([self.linear.weight]), 0.1
            yield nn.ParameterList([self.linear.bias]), 0.3

    trainer = fit(module := Two())
    rates = {id(p): group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert rates == {id(module.linear.weight): 0.1, id(module.linear.bias): 0.3}
    module = Tiny()
    module.linear.bias.requires_grad_(False)
    groups = fit(module).optimizers[0].param_groups
    assert [id(p) for group in groups for p in group["params"]] == [id(module.linear.weight)]


def test_a_resumed_run_draws_what_the_old_one_would_have_drawn(tmp_path: Path) -> None:
    """Two epochs in one go, against one epoch, a checkpoint, and the second epoch from another random state."""
    torch.manual_seed(1)
    fit(whole := Tiny(), steps=3, max_epochs=2)
    torch.manual_seed(1)
    fit(Tiny(), steps=3).save_checkpoint(tmp_path / "last.ckpt")
    torch.manual_seed(99)
    fit(resumed := Tiny(), steps=3, max_epochs=2, resume=tmp_path / "last.ckpt")
    assert resumed.draws == whole.draws[3:]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schedule": "stairs"}, r"stage\.schedule=stairs is none of cosine"),
        ({"warmup_ratio": 1.0}, r"stage\.warmup_ratio=1\.0"),
    ],
)
def test_what_cannot_work_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tiny(**keys)
