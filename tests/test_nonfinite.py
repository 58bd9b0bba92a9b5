"""NaN and infinite values: caught at their step before the weights change, dumped, replayed, and skipped if asked."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from harness import ON_POLICY, PAIRS, STAGES, Run, TinyRun
from rlhf.callbacks import PreflightChecks
from rlhf.errors import ConfigError, TrainingError
from rlhf.replay import Replay, Replayed
from rlhf.reward_functions import RewardFunction, ScoringBatch
from rlhf.stage.dumps import STATE

NAN = float("nan")


@pytest.fixture(scope="session")
def architecture() -> str:
    """Numbers go bad in the same way in every architecture."""
    return "transformer"


def two_steps(stage: str) -> dict[str, Any]:
    """Return the keywords of a run with two optimizer steps or more."""
    return {} if stage in ON_POLICY else {"data": {"batch_size": 4}}


class PlantedWeight(lightning.Callback):
    """Sets one value of a trained weight to NaN before the second training batch, and keeps what follows unchanged."""

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != 1:
            return
        self.name, weight = next(item for item in module.named_parameters() if "gate_proj" in item[0])
        with torch.no_grad():
            weight.view(-1)[5] = NAN
        self.weights = {name: weight.detach().clone() for name, weight in module.named_parameters()}
        self.moments = deepcopy(trainer.optimizers[0].state_dict())


def caught(run: Run, message: str) -> Path:
    """Train until the error that is expected, and return the directory of the only dump."""
    with pytest.raises(TrainingError, match=message):
        run.fit()
    (directory,) = Path(run.trainer.default_root_dir).glob("nonfinite/step*")
    return directory


def replayed(tiny_run: TinyRun, stage: str, directory: Path, **keys: Any) -> str:
    """Replay a dump with a new module, and return the report as text."""
    replay = Replay(directory)
    keys = {"precompute_ref_logprobs": False, **keys} if stage in ("dpo", "kto") else keys
    with pytest.raises(Replayed):
        tiny_run.build(stage, callbacks=[replay], **keys).fit(directory / STATE)
    cells = [list(column.cells) for line in replay.report if not isinstance(line, str) for column in line.columns]
    return "\n".join([str(line) for line in replay.report if isinstance(line, str)] + [str(cells)])


@pytest.mark.parametrize(
    ("stage", "precision"), [*((stage, "32-true") for stage in STAGES), ("sft", "bf16-mixed"), ("ppo", "bf16-mixed")]
)
def test_a_weight_that_is_not_finite_is_caught_at_its_step(tiny_run: TinyRun, stage: str, precision: str) -> None:
    """At the second step: weights and moments are those before it, and the dump shows where NaN comes from."""
    planted = PlantedWeight()
    keys = {**two_steps(stage), "trainer": {"precision": precision}}
    run = tiny_run.build(stage, callbacks=[planted], **keys)
    directory = caught(run, f"(?s)optimizer step 2: the loss is nan.*{planted_name(stage)}.*have not been changed")
    assert run.trainer.global_step == 1
    torch.testing.assert_close(dict(run.module.named_parameters()), planted.weights, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(run.trainer.optimizers[0].state_dict(), planted.moments, rtol=0, atol=0)
    assert directory.name == "step2"
    report = replayed(tiny_run, stage, directory, **keys)
    assert f"Weights that are not finite: {planted.name}" in report
    assert "First module with an output that is not finite: " in report
    assert ".layers.0.mlp.gate_proj" in report.split("First module")[1]
    assert "'nan'" in report


def planted_name(stage: str) -> str:
    return "model.trunk.layers.0" if stage == "reward" else "policy.lm.model.layers.0"


def test_a_loss_that_is_infinite_is_caught_though_its_gradient_is_finite(tiny_run: TinyRun) -> None:
    """A margin that float32 cannot hold: the gradient of -log sigmoid is 1 there. The message names the row."""
    rows = [{**row, "margin": 1.0} for row in PAIRS]
    rows[6]["margin"] = -1e39
    run = tiny_run.build("reward", data={"train": tiny_run.write("margins", rows), "val_fraction": 0})
    directory = caught(run, r"optimizer step 1: the loss is (inf|nan)(?s:.*)Rows: \S*margins\.jsonl:7\n")
    report = replayed(tiny_run, "reward", directory, data={"train": str(tiny_run.folder / "margins.jsonl")})
    assert "margins.jsonl:7" in report
    assert "Gradients that are not finite" in report


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_changes_nothing(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """The second of the batches has the loss NaN. All later steps train, and the first one is in the moments only."""
    weights: list[dict[str, Tensor]] = []
    plant_losses(monkeypatch, {2})

    class Weights(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            weights.append({name: weight.detach().clone() for name, weight in module.named_parameters()})

    keys = two_steps(stage)
    run = tiny_run.train(
        stage, callbacks=[Weights()], on_nonfinite="skip", weight_decay=0.1, trainer={"max_epochs": 2}, **keys
    )
    first, second, third = weights[:3]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)
    assert all(bool(weight.isfinite().all()) for weight in run.module.parameters())
    assert run.curve("train/nonfinite_steps")[-1] == 1
    assert {float(state["step"]) for state in run.trainer.optimizers[0].state.values()} == {len(weights) - 1}
    if stage in ON_POLICY:
        assert run.curve("policy/skipped")[0] == pytest.approx(1 / len(weights) * len(run.curve("policy/skipped")))
        assert all(torch.tensor(run.curve("train/loss")).isfinite())


def plant_losses(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Multiply the loss by NaN at these calls of ``training_loss``, counted from 1."""
    count = 0
    for module in {stage.module for stage in STAGES.values()}:
        training_loss = module.training_loss

        def planted(self: Any, batch: Any, original: Any = training_loss) -> Any:
            nonlocal count
            count += 1
            loss, metrics = original(self, batch)
            return loss * (NAN if count in calls else 1.0), metrics

        monkeypatch.setattr(module, "training_loss", planted)


def test_training_stops_after_too_many_skipped_steps_in_a_row(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2, 3, 5 and 6 and the row checks of no other call fail: only from step 8 on there are three in a row."""
    plant_losses(monkeypatch, {2, 3, 5, 6, *range(8, 20)})
    run = tiny_run.build(
        "sft", on_nonfinite="skip", max_nonfinite_steps=2, data={"batch_size": 1}, trainer={"max_epochs": 2}
    )
    monkeypatch.setattr("rlhf.stage.nonfinite._faulty_rows", lambda module, micro: micro.batch)
    with pytest.raises(TrainingError, match=r"step 10: .*max_nonfinite_steps=2, and 2 steps in a row were skipped"):
        run.fit()
    assert sorted(path.name for path in tiny_run.folder.glob("nonfinite/*")) == ["step10", "step2"]


def test_all_micro_batches_of_a_step_are_dumped(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two micro-batches is not finite; the message names its rows only."""
    plant_losses(monkeypatch, {3})
    monkeypatch.setattr("rlhf.stage.nonfinite._faulty_rows", lambda module, micro: micro.batch)
    keys = {"data": {"batch_size": 2}, "trainer": {"accumulate_grad_batches": 2}}
    run = tiny_run.build("sft", **keys)
    directory = caught(run, r"optimizer step 2(?s:.*)Rows: \S+sft\.jsonl:\d, \S+sft\.jsonl:\d\n")
    monkeypatch.undo()
    assert "Batch 2 of 2" in replayed(tiny_run, "sft", directory, **keys)


@pytest.mark.parametrize("loss", [NAN, 1.0])
def test_overflowing_gradients_of_float16_are_left_to_the_scaler(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    """The scale 1e38 makes every gradient infinite. Only a loss that is not finite is an error."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1e38))
    training_loss = STAGES["sft"].module.training_loss
    monkeypatch.setattr(
        STAGES["sft"].module,
        "training_loss",
        lambda self, batch: (training_loss(self, batch)[0] * loss, {}),
    )
    run = tiny_run.build("sft", trainer={"plugins": [plugin]})
    if loss == 1.0:
        run.fit()
        assert plugin.scaler is not None
        assert plugin.scaler.get_scale() < 1e38
    else:
        caught(run, "the loss is nan")


# Rollouts


class FaultyReward(RewardFunction):
    """Returns NaN for the third response from the end in some calls."""

    def __init__(self, calls: set[int]) -> None:
        super().__init__()
        self.calls, self.count = calls, 0

    def forward(self, batch: ScoringBatch) -> Tensor:
        self.count += 1
        scores = torch.arange(float(len(batch.input_ids)), device=batch.input_ids.device)
        if self.count in self.calls:
            scores[-3] = NAN
        return scores


@pytest.mark.parametrize("stage", ON_POLICY)
def test_a_score_that_is_not_finite_names_its_row(tiny_run: TinyRun, stage: str) -> None:
    """Nothing is trained on the second rollout, and the dump shows the score of each response."""
    keys = {"reward": FaultyReward({2}), "trainer": {"max_epochs": 2}}
    run = tiny_run.build(stage, **({"critic_init": "sft"} if stage == "ppo" else {}), **keys)
    directory = caught(run, rf"the score of 1 of 8 responses \(nan\) is not finite(?s:.*){stage}\.jsonl:\d\n")
    report = replayed(tiny_run, stage, directory, reward=FaultyReward({1}), trainer={"max_epochs": 2})
    assert report.count("'nan'") == 1
    assert "'5'" not in report


def test_updates_on_a_rollout_that_is_not_finite_are_skipped(tiny_run: TinyRun) -> None:
    """The second of three rollouts: two minibatches are skipped, and neither moments nor coefficient see it."""
    keys = {"critic_init": "sft", "trainer": {"max_epochs": 3}, "ppo_epochs": 1}
    run = tiny_run.train("ppo", reward=FaultyReward({2}), on_nonfinite="skip", **keys)
    assert run.curve("policy/skipped") == [0.0, 1.0, 0.0]
    assert run.curve("train/nonfinite_steps") == [0.0, 2.0, 2.0]
    assert run.module.scores.count == 16
    assert run.module.scores.mean == pytest.approx(3.5)
    assert all(bool(weight.isfinite().all()) for weight in run.module.parameters())


def test_training_stops_after_too_many_skipped_rollouts_in_a_row(tiny_run: TinyRun) -> None:
    """Rollouts have 4 steps, and the limit is 2: training continues after rollout 2, and stops at the third in a row.

    By then, rollouts 2, 4 and 5 have been skipped, which are 3 x 4 = 12 optimizer steps, and 5 x 4 = 20 steps are over.
    """
    keys = {"critic_init": "sft", "trainer": {"max_epochs": 8}, "on_nonfinite": "skip", "max_nonfinite_steps": 2}
    run = tiny_run.build("ppo", reward=FaultyReward({2, 4, 5, 6}), **keys)
    with pytest.raises(TrainingError, match=r"step 21: .*max_nonfinite_steps=2, and 2 steps in a row were skipped"):
        run.fit()
    assert run.curve("train/nonfinite_steps") == [0.0, 4.0, 4.0, 8.0, 12.0]


def test_preflight_checks_report_a_rollout_without_a_dump(tiny_run: TinyRun) -> None:
    """There is no state of training to dump yet."""
    checks = PreflightChecks(tiny_run.folder, {}, only=True)
    with pytest.raises(TrainingError, match="optimizer step 1: the score of 1 of"):
        tiny_run.train("ppo", reward=FaultyReward({*range(1, 50)}), critic_init="sft", callbacks=[checks])
    assert not (tiny_run.folder / "nonfinite").exists()


# Settings and checkpoints


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"on_nonfinite": "ignore"}, r"stage\.on_nonfinite must be stop or skip, got 'ignore'"),
        ({"max_nonfinite_steps": 0}, r"stage\.max_nonfinite_steps must be an integer of at least 1, got 0"),
        ({"max_nonfinite_steps": 3}, r"stage\.max_nonfinite_steps=3 has no effect with stage\.on_nonfinite=stop\.\n"),
    ],
)
def test_invalid_settings_are_rejected(tiny_run: TinyRun, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run.module("sft", **keys)


def test_debugging_writes_no_dump(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_losses(monkeypatch, set(range(1, 20)))
    with pytest.raises(TrainingError, match="the loss is nan"):
        tiny_run.train("sft", trainer={"fast_dev_run": True})
    assert not (tiny_run.folder / "nonfinite").exists()


def test_a_resumed_run_continues_the_count(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_losses(monkeypatch, {1})
    keys = {"on_nonfinite": "skip", "data": {"batch_size": 4}}
    first = tiny_run.train("sft", **keys)
    first.trainer.save_checkpoint(tiny_run.folder / "first.ckpt")
    resumed = tiny_run.train("sft", resume=tiny_run.folder / "first.ckpt", trainer={"max_epochs": 2}, **keys)
    assert resumed.curve("train/nonfinite_steps") == [1.0, 1.0]


def test_a_dump_that_cannot_be_written_does_not_hide_the_fault(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    plant_losses(monkeypatch, {1})
    monkeypatch.setattr("rlhf.stage.nonfinite.write_dump", full)
    with pytest.raises(TrainingError, match=r"the loss is nan(?s:.*)could not be written to .*: .*No space left"):
        tiny_run.train("sft")
