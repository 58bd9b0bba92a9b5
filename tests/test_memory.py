"""Out of memory: the message names the keys to change, and a step that is computed in pieces has the same result."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import ON_POLICY, STAGES, TinyRun, assert_same_weights
from rlhf.errors import ConfigError, TrainingError
from rlhf.rl import UpdateLimits
from rlhf.stage.memory import is_out_of_memory, report_out_of_memory

SPLITTABLE = [stage for stage in STAGES if stage != "kto"]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="session")
def architecture() -> str:
    """Memory runs out in the same way in every architecture."""
    return "transformer"


def limit_memory(monkeypatch: pytest.MonkeyPatch, rows: int, *, where: str, first_call: int = 1) -> list[int]:
    """Let memory run out for batches of more than ``rows`` rows, in the ``forward`` or at the end of the ``backward``.

    Returns:
        The number of rows of each batch that was computed.
    """
    sizes: list[int] = []
    for module in {stage.module for stage in STAGES.values()}:
        training_loss = module.training_loss

        def limited(self: Any, batch: Any, original: Any = training_loss) -> Any:
            sizes.append(batch.row_count)
            exceeded = batch.row_count > rows and len(sizes) >= first_call
            if exceeded and where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            loss, metrics = original(self, batch)
            if exceeded:
                embedding = next(self.parameters())
                embedding.register_post_accumulate_grad_hook(fail)
            return loss, metrics

        monkeypatch.setattr(module, "training_loss", limited)

    return sizes


def fail(weight: Tensor) -> None:
    """Raise once that memory has run out, when the gradient of a weight is complete."""
    weight._post_accumulate_grad_hooks.clear()  # type: ignore[attr-defined]
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("stage", SPLITTABLE)
def test_a_halved_batch_gives_the_same_step(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, stage: str, where: str
) -> None:
    """Batches of 8 rows, of which 4 fit into memory. Metrics are those of the whole batch."""
    keys = {"minibatch_size": 8} if stage in ON_POLICY else {}
    keys = {**keys, "eps": 1e-5, "trainer": {"gradient_clip_val": 1.0}}
    whole = tiny_run.train(stage, **keys)
    sizes = limit_memory(monkeypatch, 4, where=where)
    halved = tiny_run.train(stage, on_out_of_memory="halve", **keys)
    assert sizes[:3] == [8, 4, 4]
    assert set(sizes[1:]) == {4}
    # The gradient of the bias of a pairwise reward model is 0 up to rounding, which AdamW amplifies.
    assert_same_weights(halved.module, whole.module, **{**CLOSE, "atol": 1e-5})
    for one, other in zip(halved.logger.calls, whole.logger.calls, strict=True):
        ignored = {name for name in other if "throughput" in name}
        if other.get("rewards/margins") == 0:  # Where rewards are equal, rounding decides which one is larger.
            ignored.add("rewards/accuracies")
        one, other = ({name: call[name] for name in call if name not in ignored} for call in (one, other))
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_accumulated_step_is_computed_again(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Memory runs out in the second of two micro-batches of 4 rows; the first one is computed in pieces as well."""
    keys = {"eps": 1e-5, "data": {"batch_size": 4}, "trainer": {"accumulate_grad_batches": 2}}
    whole = tiny_run.train("sft", **keys)
    sizes = limit_memory(monkeypatch, 2, where=where, first_call=2)
    halved = tiny_run.train("sft", on_out_of_memory="halve", **keys)
    assert sizes == [4, 4, 2, 2, 2, 2]
    assert_same_weights(halved.module, whole.module, **CLOSE)
    assert halved.curve("train/loss") == pytest.approx(whole.curve("train/loss"))


def test_a_piece_that_is_not_finite_is_found(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 4, where="forward")
    limited = STAGES["sft"].module.training_loss
    count = 0

    def planted(self: Any, batch: Any) -> Any:
        nonlocal count
        loss, metrics = limited(self, batch)
        count += 1
        return loss * (float("nan") if count == 1 else 1.0), metrics

    monkeypatch.setattr(STAGES["sft"].module, "training_loss", planted)
    with pytest.raises(TrainingError, match="the loss is nan"):
        tiny_run.train("sft", on_out_of_memory="halve")


def test_a_single_row_that_does_not_fit_is_an_error(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = limit_memory(monkeypatch, 0, where="forward")
    with pytest.raises(torch.OutOfMemoryError):
        tiny_run.train("sft", on_out_of_memory="halve")
    assert sizes == [8, 4, 2, 1]


@pytest.mark.parametrize(
    ("stage", "keys", "message"),
    [
        ("sft", {"on_out_of_memory": "wait"}, r"stage\.on_out_of_memory must be stop or halve, got 'wait'"),
        ("kto", {"on_out_of_memory": "halve"}, "KL baseline of KTO"),
        ("ppo", {"on_out_of_memory": "halve", "limits": UpdateLimits(skip_ratio=10.0)}, "means over a whole minibatch"),
    ],
)
def test_settings_that_cannot_be_halved_are_rejected(
    tiny_run: TinyRun, stage: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run.train(stage, **keys)


# Messages


@pytest.mark.parametrize(
    ("stage", "place", "expected"),
    [
        ("sft", "rlhf.sft.module.cross_entropy_loss", "computing a training step .*data.batch_size=4 trainer.acc.*=2"),
        (
            "ppo",
            "rlhf.rl.policy_update.clipped_policy_loss",
            "computing a training step .*stage.minibatch_size=2 trainer.acc.*=2",
        ),
        ("ppo", "rlhf.sampling.sampler.LocalSampler._decoding", "sampling responses .*stage.rollout_batch_size=4"),
        ("ppo", "rlhf.rl.collector.Collector._evaluate", "evaluating a rollout .*stage.minibatch_size=2"),
    ],
)
def test_the_message_names_the_phase_and_the_keys(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, stage: str, place: str, expected: str
) -> None:
    def exhausted(*arguments: Any, **keys: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 64 TB")

    run = tiny_run.build(stage)
    monkeypatch.setattr(place, exhausted)
    expected = f"(?s)stage={stage} has run out of memory while {expected}"
    with (
        pytest.raises(TrainingError, match=expected) as raised,
        report_out_of_memory(stage, run.module, run.datamodule),
    ):
        run.fit()
    assert "can't allocate memory" in str(raised.value)
    assert raised.value.exit_code == 1


def test_memory_of_evaluation(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run.build("sft", data={"val": tiny_run.write("val", STAGES["sft"].records)})

    def validation_step(self: Any, *arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(STAGES["sft"].module, "validation_step", validation_step)
    with (
        pytest.raises(TrainingError, match=r"(?s)validation or test metrics .*data\.eval_batch_size=4"),
        report_out_of_memory("sft", run.module, run.datamodule),
    ):
        run.fit()


def test_other_errors_pass() -> None:
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"), report_out_of_memory("sft", SimpleNamespace(), None):
        raise RuntimeError("shapes differ")


def test_real_allocations_that_fail_are_recognized() -> None:
    """One exabyte, which no machine has."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
