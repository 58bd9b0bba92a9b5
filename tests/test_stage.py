"""What all training stages share: schedule, optimizer, random state, gradient norm, hyperparameters."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import get_scheduler

from harness import DEMONSTRATIONS, EXACT, MetricsLogger, TinyRun, quick_trainer
from rlhf.errors import ConfigError
from rlhf.logs import TextLogger, log_file
from rlhf.ppo import PPOModule
from rlhf.sft import SFTModule
from rlhf.stage import Mean, Metrics, Result, StageModule
from rlhf.stage.optimizer import relative_rate
from rlhf.stage.random_state import get_random_state, separate_random_state, set_random_state
from rlhf.stage.sample_table import markdown_table, text_table
from rlhf.stage.step_metrics import StepMetrics


class TinyStage(StageModule):
    """A stage with a matrix and a vector of ones. Its gradient is ``slope``, and each step draws random numbers."""

    def __init__(self, *, slope: float = 0.0, **optimizer: Any) -> None:
        super().__init__(**{"learning_rate": 0.1, "schedule": "constant", **optimizer})
        self.linear = nn.Linear(2, 2)
        nn.init.ones_(self.linear.weight)
        nn.init.ones_(self.linear.bias)
        self.slope = slope
        self.learning_rates: list[float] = []
        self.draws: list[tuple[float, ...]] = []  # of PyTorch, ``random`` and NumPy
        self.clipped_norms: list[float] = []  # of the gradients that the optimizer gets
        self.kept: list[bool] = []  # whether gradients exist when the loss is computed

    def training_loss(self, batch: Tensor) -> tuple[Tensor, Metrics]:
        self.learning_rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.draws.append((float(torch.rand(())), random.random(), numpy.random.standard_normal()))
        self.kept.append(self.linear.weight.grad is not None)
        return self.slope * (self.linear.weight.sum() + self.linear.bias.sum()), {}

    def configure_gradient_clipping(self, *args: Any, **settings: Any) -> None:
        super().configure_gradient_clipping(*args, **settings)
        self.clipped_norms.append(
            float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))
        )

    def result(self) -> Result:
        raise NotImplementedError


class Batches:
    """A loader of equal batches. A DataLoader would draw random numbers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.zeros(self.count, 1)


def fit(module: TinyStage, *, steps: int = 1, resume: Path | None = None, **flags: Any) -> lightning.Trainer:
    """Train for epochs of ``steps`` batches."""
    trainer: lightning.Trainer = quick_trainer(**flags)
    trainer.fit(module, Batches(steps), ckpt_path=resume, weights_only=True)
    return trainer


class SaveAtStep(lightning.Callback):
    """Saves a checkpoint at the end of the epoch in which a step is reached."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


# Optimizer and schedule


def test_linear_schedule_by_hand() -> None:
    """10 steps with a warmup of 2: factors 0, 1/2, then (10 - k) / 8. After the last step the factor is 0."""
    module = TinyStage(schedule="linear", warmup_ratio=0.2)
    trainer = fit(module, steps=10)
    assert module.learning_rates == pytest.approx([0.1 * x for x in (0, 1 / 2, *((10 - k) / 8 for k in range(2, 10)))])
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


def test_cosine_schedule_by_hand() -> None:
    """The factor is (1 + cos(pi k / 8)) / 2 at step k of 8. After the last step it is 0."""
    module = TinyStage(schedule="cosine")
    trainer = fit(module, steps=8)
    assert module.learning_rates == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)


def test_constant_schedule_by_hand() -> None:
    """4 steps with a warmup of 2: factors 0, 1/2, 1, 1."""
    module = TinyStage(schedule="constant", warmup_ratio=0.5)
    fit(module, steps=4)
    assert module.learning_rates == pytest.approx([0.0, 0.05, 0.1, 0.1])


@pytest.mark.parametrize("warmup", [0, 1, 3, 7])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers(name: str, warmup: int) -> None:
    """In each of 7 steps, of which some or all are warmup. After them, a schedule that decays stays at 0."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    expected = get_scheduler("constant_with_warmup" if name == "constant" else name, optimizer, warmup, 7).lr_lambdas[0]
    found = [relative_rate(step, name=name, warmup=warmup, steps=7) for step in range(9)]
    assert found == pytest.approx([*(expected(step) for step in range(7)), *[float(name == "constant")] * 2])


def test_schedule_advances_once_per_optimizer_step() -> None:
    """2 epochs of 8 batches with accumulation over 2 are 8 optimizer steps. Each learning rate serves 2 batches."""
    module = TinyStage(schedule="linear")
    trainer = fit(module, steps=8, accumulate_grad_batches=2, max_epochs=2)
    assert trainer.global_step == 8
    assert module.learning_rates == pytest.approx([0.1 * (8 - k // 2) / 8 for k in range(16)])


def test_weight_decay_applies_to_matrices_only() -> None:
    """With learning rate 0.1, decay 0.5 and gradient 0, AdamW scales the matrix by 1 - 0.05 and keeps the vector."""
    module = TinyStage(weight_decay=0.5)
    fit(module)
    torch.testing.assert_close(module.linear.weight, torch.full((2, 2), 0.95), check_dtype=True)
    assert module.linear.bias.tolist() == [1.0, 1.0]


def test_grad_norm_is_logged_before_clipping() -> None:
    """The gradient is 3 for each of 6 parameters, so its norm is 3 sqrt(6) with and without clipping."""
    for clip in (None, 0.5):
        trainer = fit(TinyStage(slope=3.0), gradient_clip_val=clip)
        assert float(trainer.callback_metrics["grad_norm"]) == pytest.approx(3 * 6**0.5)
        assert float(trainer.callback_metrics["lr"]) == pytest.approx(0.1)


def test_gradients_are_freed_after_each_optimizer_step() -> None:
    """The next forward pass does not need their memory in addition. Batches of one step add to the same gradients."""
    fit(module := TinyStage(slope=3.0), steps=4, accumulate_grad_batches=2)
    assert module.kept == [False, True, False, True]
    assert module.linear.weight.grad is None


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("by_plugin", [False, True], ids=["trainer.precision", "trainer.plugins"])
def test_gradients_are_clipped_under_mixed_precision(precision: str, by_plugin: bool) -> None:
    """With a gradient scaler, AdamW is not fused. A norm of 3 sqrt(6) is clipped to 0.5."""
    scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
    plugin = lightning.pytorch.plugins.MixedPrecision(precision, "cpu", scaler)
    flags = {"plugins": [plugin]} if by_plugin or scaler else {"precision": precision}
    trainer = fit(module := TinyStage(slope=3.0), steps=2, gradient_clip_val=0.5, **flags)
    assert trainer.global_step == 2
    assert trainer.optimizers[0].defaults["fused"] is (None if scaler else True)
    assert float(trainer.callback_metrics["grad_norm"]) == pytest.approx(3 * 6**0.5)
    assert module.clipped_norms == pytest.approx([0.5] * 2, rel=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize(
    ("limit", "algorithm", "expected"),
    [
        (0.5, "norm", 0.5),
        (0.5, None, 0.5),
        (7.5, "norm", 3 * 6**0.5),
        (0.5, "value", 0.5 * 6**0.5),
        (None, None, 3 * 6**0.5),
    ],
)
def test_gradients_are_clipped(precision: str, limit: float | None, algorithm: str | None, expected: float) -> None:
    """Six gradients of 3 have a norm of 3 sqrt(6), or 7.35. AdamW is fused."""
    flags = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm, "precision": precision}
    trainer = fit(module := TinyStage(slope=3.0), steps=2, **flags)
    assert trainer.optimizers[0].defaults["fused"] is True
    assert module.clipped_norms == pytest.approx([expected] * 2, rel=4e-3)  # bfloat16 has eight bits


def test_each_trainable_module_has_its_learning_rate() -> None:
    """Parameters without gradients are not in the optimizer."""

    class TwoRates(TinyStage):
        def trainable_modules(self) -> Any:
            yield nn.ParameterList([self.linear.weight]), 0.1
            yield nn.ParameterList([self.linear.bias]), 0.3

    trainer = fit(module := TwoRates())
    learning_rates = {id(p): group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert learning_rates == {id(module.linear.weight): 0.1, id(module.linear.bias): 0.3}
    module = TinyStage()
    module.linear.bias.requires_grad_(False)
    groups = fit(module).optimizers[0].param_groups
    assert [id(p) for group in groups for p in group["params"]] == [id(module.linear.weight)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schedule": "stairs"}, r"stage\.schedule must be cosine, linear, or constant, got 'stairs'\."),
        ({"warmup_ratio": 1.0}, r"stage\.warmup_ratio must be a number of at least 0 and below 1, got 1\.0\."),
    ],
)
def test_invalid_optimizer_settings_are_rejected(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TinyStage(**keys)


# Checkpoints


def test_resumed_run_draws_the_same_random_numbers(tmp_path: Path) -> None:
    """Two epochs in one run, compared with one epoch and a second one that resumes from another random state."""
    lightning.seed_everything(1, verbose=False)
    fit(whole := TinyStage(), steps=3, max_epochs=2)
    lightning.seed_everything(1, verbose=False)
    fit(TinyStage(), steps=3).save_checkpoint(tmp_path / "last.ckpt")
    lightning.seed_everything(99, verbose=False)
    fit(resumed := TinyStage(), steps=3, max_epochs=2, resume=tmp_path / "last.ckpt")
    assert resumed.draws == whole.draws[3:]


def draw() -> list[float]:
    """Draw from all generators. NumPy computes two normal numbers at once, and keeps the second one."""
    return [float(torch.rand(())), random.random(), random.gauss(0, 1), numpy.random.standard_normal()]


def test_separate_draws_are_reproducible_and_change_no_others() -> None:
    lightning.seed_everything(1, verbose=False)
    draw()
    state = get_random_state()
    expected, separate = draw(), []
    set_random_state(state)
    for _ in range(2):
        with separate_random_state(7):
            separate.append(draw())
    assert draw() == expected
    assert separate[0] == separate[1]


def test_an_older_checkpoint_restores_the_state_that_it_has() -> None:
    """It has no state of ``random`` and of NumPy: their generators continue."""
    lightning.seed_everything(1, verbose=False)
    state = get_random_state()
    first, second = draw(), draw()
    lightning.seed_everything(1, verbose=False)
    draw()
    set_random_state({name: state[name] for name in ("cpu", "accelerator")})
    assert draw() == [first[0], *second[1:]]


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_resumed_run_continues_its_schedule(tmp_path: Path, schedule: str) -> None:
    """A run of 4 epochs of 2 steps, interrupted after the second epoch."""
    keys = {"schedule": schedule, "warmup_ratio": 0.25}
    fit(whole := TinyStage(**keys), steps=2, max_epochs=4)
    fit(TinyStage(**keys), steps=2, max_epochs=4, callbacks=[SaveAtStep(4, tmp_path / "last.ckpt")])
    fit(resumed := TinyStage(**keys), steps=2, max_epochs=4, resume=tmp_path / "last.ckpt")
    assert resumed.learning_rates == whole.learning_rates[4:]


def test_a_longer_run_starts_the_schedule_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A finished run of 4 steps goes on for 4 steps with a schedule of 4 steps; a run of 12 steps for 8 steps.

    Continuing the schedule of 4 steps in a run of 8 would take a step with the learning rate 0, and then jump to half
    of the peak. A checkpoint of the longer run continues its schedule.
    """
    longer = {"schedule": "linear", "warmup_ratio": 0.25}
    trainer = fit(first := TinyStage(**longer), steps=4)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0
    fit(second := TinyStage(**longer), steps=4, max_epochs=2, resume=tmp_path / "first.ckpt")
    assert second.learning_rates == first.learning_rates
    assert "had 4 optimizer steps" in caplog.text
    caplog.clear()
    save = SaveAtStep(8, tmp_path / "second.ckpt")
    fit(third := TinyStage(**longer), steps=4, max_epochs=3, resume=tmp_path / "first.ckpt", callbacks=[save])
    expected = [0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert third.learning_rates == pytest.approx([0.1 * factor for factor in expected])
    caplog.clear()
    fit(fourth := TinyStage(**longer), steps=4, max_epochs=3, resume=tmp_path / "second.ckpt")
    assert fourth.learning_rates == third.learning_rates[4:]
    assert caplog.text.count("starts again") == 0


@pytest.mark.parametrize(
    ("limits", "expected", "message"),
    [
        ({}, [1 / 2, 1 / 4], "continues at step 4"),
        ({"max_steps": 4}, [1, 1 / 2], "starts again at step 4"),
    ],
)
def test_a_schedule_covers_epochs_of_other_lengths(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limits: dict[str, int], expected: list[float], message: str
) -> None:
    """After an epoch of 4 steps, the second one has 2. With a limit of 4 steps, the first run ended after its epoch."""
    save = SaveAtStep(4, tmp_path / "last.ckpt")
    fit(TinyStage(schedule="linear"), steps=4, **{"max_epochs": 2, **limits}, callbacks=[save])
    resumed = TinyStage(schedule="linear")
    trainer = fit(resumed, steps=2, max_epochs=2, resume=tmp_path / "last.ckpt")
    assert resumed.learning_rates == pytest.approx([0.1 * rate for rate in expected])
    assert trainer.global_step == 6
    assert message in caplog.text


def test_the_learning_rate_finder_tries_the_rates_that_it_is_given(tmp_path: Path) -> None:
    module = TinyStage(slope=1.0)
    tuner = Tuner(quick_trainer(default_root_dir=tmp_path))
    tuner.lr_find(module, Batches(8), min_lr=1e-8, num_training=8, update_attr=False)
    assert module.learning_rates == sorted(module.learning_rates)
    assert module.learning_rates[:2] == pytest.approx([1e-8, 1e-6]), "the configured one is 0.1"


def test_hyperparameters_contain_plain_values_only(tmp_path: Path) -> None:
    """A checkpoint with other objects could not be loaded with weights_only=True."""
    from omegaconf import OmegaConf

    module = TinyStage(slope=2.0, betas=OmegaConf.create([0.8, 0.9]), tokenizer=object())  # type: ignore[arg-type]
    fit(module).save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]
    defaults = "weight_decay eps warmup_ratio gradient_checkpointing on_nonfinite max_nonfinite_steps on_out_of_memory"
    assert stored == {"slope": 2.0, "learning_rate": 0.1, "schedule": "constant", "betas": [0.8, 0.9]} | {
        name: stored[name] for name in defaults.split()
    }
    loaded = TinyStage.load_from_checkpoint(tmp_path / "last.ckpt", slope=5.0)
    assert (loaded.slope, loaded.betas) == (5.0, (0.8, 0.9))


def test_load_from_checkpoint_restores_sft(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Only the arguments that are objects have to be passed again."""
    run = tiny_run.train("sft", warmup_ratio=0.25)
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = tiny_run.module("sft")
    loaded = SFTModule.load_from_checkpoint(tmp_path / "last.ckpt", policy=fresh.source, tokenizer=tiny_run.tokenizer)
    torch.testing.assert_close(dict(loaded.state_dict()), run.weights, **EXACT)
    assert loaded.hparams["warmup_ratio"] == 0.25


def test_load_from_checkpoint_restores_ppo(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Frozen models are not part of a checkpoint. They are opened again from their sources."""
    run = tiny_run.train("ppo", gamma=0.5)
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = tiny_run.module("ppo")
    loaded = PPOModule.load_from_checkpoint(
        tmp_path / "last.ckpt",
        policy=fresh.source,
        reward_model=fresh.reward_sources,
        reward=fresh.reward,
        tokenizer=tiny_run.tokenizer,
    )
    torch.testing.assert_close(dict(loaded.state_dict()), run.weights, **EXACT)
    assert loaded.gamma == 0.5
    torch.testing.assert_close(
        dict(loaded.reference.model.state_dict()), dict(run.module.reference.model.state_dict()), **EXACT
    )


# Logged metrics


class Measuring(TinyStage):
    """Logs the number of the batch with the weight of the batch, and half of the batches log their own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches += 1
        number = float(self.batches)
        metrics: dict[str, Tensor | float | Mean] = {"number": torch.tensor(number), "float": number}
        if batch_idx % 2:
            metrics["odd"] = Mean(torch.tensor(number), 3.0)
        metrics["none"] = Mean(torch.tensor(float("nan")), 0.0)
        self.log_train(metrics, weight=number)
        return self.training_loss(batch)[0]


def test_metrics_are_weighted_means_over_the_optimizer_step() -> None:
    """Batches 1 and 2 with weights 1 and 2, then 3 and 4 with weights 3 and 4: 4 batches of 8 log what 1 of 32 does."""
    fit(Measuring(), steps=4, accumulate_grad_batches=2, logger=(logger := MetricsLogger()))
    assert [call["number"] for call in logger.calls if "number" in call] == pytest.approx([5 / 3, 25 / 7])
    assert [call["float"] for call in logger.calls if "float" in call] == pytest.approx([5 / 3, 25 / 7])
    assert [call["odd"] for call in logger.calls if "odd" in call] == [2.0, 4.0]
    assert not any("none" in call for call in logger.calls)


def test_metrics_are_collected_in_log_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a log every 2 steps, steps 1 and 3 add nothing, read nothing and communicate nothing."""
    reduced: list[int] = []
    reduce = StepMetrics.reduce
    monkeypatch.setattr(StepMetrics, "reduce", lambda self: reduced.append(len(self.means)) or reduce(self))
    fit(module := Measuring(), steps=4, log_every_n_steps=2, logger=(logger := MetricsLogger()))
    assert [call["number"] for call in logger.calls if "number" in call] == [2.0, 4.0]
    assert len(reduced) == 2
    assert (module.metrics["number"], module.metrics_step) == (4.0, 3)
    assert all(isinstance(value, float) for value in module.metrics.values())


def test_callbacks_can_monitor_training_metrics() -> None:
    """As with ``self.log``: ``EarlyStopping`` and ``ModelCheckpoint`` read them from the Trainer."""
    early = lightning.pytorch.callbacks.EarlyStopping(
        "number", mode="max", stopping_threshold=1.5, check_on_train_epoch_end=True
    )
    trainer = fit(Measuring(), steps=1, max_epochs=9, callbacks=[early], logger=(logger := MetricsLogger()))
    assert early.stopped_epoch == 1  # in which the number is 2, the first epoch being 0
    assert float(trainer.logged_metrics["number"]) == 2
    assert [call["epoch"] for call in logger.calls if "number" in call] == [0, 1]
    assert logger.saved[1] == 1  # The metrics of a step are on disk before the next one.


# Sample table


def test_markdown_table_by_hand() -> None:
    table = markdown_table(("prompt", "response"), [("a | b", "c\r\nd\re\nf")])
    assert table == "| prompt | response |\n| --- | --- |\n| a \\| b | c<br>d<br>e<br>f |"


def test_text_table_by_hand() -> None:
    """One line per cell. The further lines of a cell are indented like its first one."""
    table = text_table(("prompt", "score"), [("a\nb", "1.5"), ("c", "-2")])
    assert table == ("1.  prompt  a\n            b\n    score   1.5\n2.  prompt  c\n    score   -2")


def test_samples_are_shown_in_tensorboard_and_in_the_text_log(tmp_path: Path) -> None:
    """Numbers have four digits. A further logger without text is left out."""

    class Showing(TinyStage):
        def on_train_end(self) -> None:
            self.log_samples(("prompt", "score"), [("It rains.", 0.123456)], name="examples")

    loggers = [TensorBoardLogger(tmp_path, name="tensorboard"), TextLogger(), MetricsLogger()]
    with log_file(tmp_path / "log"):
        fit(Showing(), steps=2, logger=loggers)
    assert "step=2 examples\n1.  prompt  It rains.\n    score   0.1235\n" in (tmp_path / "log").read_text()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "version_0")).Reload()
    (event,) = events.Tensors("examples/text_summary")
    assert event.step == 2
    assert event.tensor_proto.string_val[0].decode() == "| prompt | score |\n| --- | --- |\n| It rains. | 0.1235 |"


# Epochs of the Trainer


def test_overfit_batches_repeat_the_same_rows(tiny_run: TinyRun) -> None:
    run = tiny_run.train("sft", trainer={"overfit_batches": 2, "max_epochs": 3}, data={"batch_size": 2})
    rows = [batch.indices for batch in run.batches]
    assert len(rows) == 6
    assert rows[:2] == rows[2:4] == rows[4:]


def test_reloaded_data_have_the_weights_of_a_limited_epoch(tiny_run: TinyRun) -> None:
    """The last of 3 batches is an optimizer step of 2 batches of which the second one never comes."""
    flags = {"reload_dataloaders_every_n_epochs": 1, "limit_train_batches": 3, "accumulate_grad_batches": 2}
    run = tiny_run.train("sft", trainer={**flags, "max_epochs": 2}, data={"batch_size": 1})
    assert [run.batches[number].loss_weight for number in (2, 5)] == [2.0, 2.0]


def test_a_schedule_of_accumulation_changes_the_weights(tiny_run: TinyRun) -> None:
    schedule = lightning.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 4})
    run = tiny_run.train("sft", callbacks=[schedule], trainer={"max_epochs": 2}, data={"batch_size": 2})
    weights = [batch.loss_weight for batch in run.batches]
    assert weights[:4] == [1.0] * 4
    assert len(set(weights[4:])) > 1
    assert sum(weights[4:]) == pytest.approx(4)


def test_throughput_excludes_validation(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock advances 2 s in a training batch of 8 rows, and 100 s in a validation: 8 / 2 = 4 rows per second."""
    clock = [0.0]
    monkeypatch.setattr("rlhf.stage.throughput.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Clock(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock[0] += 2

        def on_validation_batch_start(self, *_: Any) -> None:
            clock[0] += 100

    data = {"val": tiny_run.write("val", DEMONSTRATIONS)}
    run = tiny_run.train("sft", data=data, callbacks=[Clock()], trainer={"max_epochs": 3})
    assert clock == [306.0]
    assert run.curve("throughput/sequences_per_s") == [4.0, 4.0, 4.0]
