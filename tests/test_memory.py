"""Out of memory: a step that is computed in chunks has the same result."""

from typing import Any

import pytest
import torch
from torch import Tensor

from harness import ON_POLICY, STAGES, TinyRun, assert_same_weights
from rlhf.errors import ConfigError, TrainingError
from rlhf.rl import UpdateLimits

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


@pytest.mark.parametrize(
    ("stage", "where"), [*((stage, "forward") for stage in SPLITTABLE), ("sft", "backward"), ("ppo", "backward")]
)
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
    """Memory runs out in the second of two micro-batches of 4 rows; the first one is computed in chunks as well."""
    keys = {"eps": 1e-5, "data": {"batch_size": 4}, "trainer": {"accumulate_grad_batches": 2}}
    whole = tiny_run.train("sft", **keys)
    sizes = limit_memory(monkeypatch, 2, where=where, first_call=2)
    halved = tiny_run.train("sft", on_out_of_memory="halve", **keys)
    assert sizes == [4, 4, 2, 2, 2, 2]
    assert_same_weights(halved.module, whole.module, **CLOSE)
    assert halved.curve("train/loss") == pytest.approx(whole.curve("train/loss"))


def test_a_chunk_that_is_not_finite_is_found(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
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
