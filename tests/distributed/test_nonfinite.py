"""A value that is not finite on one of two ranks: both ranks stop, or skip, at the same step."""

from typing import Any

import pytest
import torch

from harness import STAGES, TinyRun
from ranks import DDP, in_ranks
from rlhf.errors import TrainingError


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


def plant_on_rank_1(rank: int, stage: str, step: int) -> None:
    """Multiply the loss of a batch of rank 1 by NaN. This process belongs to one test only."""
    module, calls = STAGES[stage].module, [0]
    training_loss = module.training_loss  # type: ignore[attr-defined]

    def planted(self: Any, batch: Any) -> Any:
        calls[0] += 1
        loss, metrics = training_loss(self, batch)
        return loss * (float("nan") if rank == 1 and calls[0] == step else 1.0), metrics

    module.training_loss = planted  # type: ignore[attr-defined]


def stop_and_skip(rank: int, tiny_run: TinyRun) -> dict[str, Any]:
    """Train SFT until rank 1 has a loss of NaN at the second step, and PPO with such steps skipped."""
    folder = tiny_run.folder
    plant_on_rank_1(rank, "sft", 2)
    stopped = tiny_run.build("sft", data={"batch_size": 2}, trainer={**DDP, "default_root_dir": folder / "sft"})
    with pytest.raises(TrainingError) as raised:
        stopped.fit()
    plant_on_rank_1(rank, "ppo", 2)
    skipped = tiny_run.train(
        "ppo", on_nonfinite="skip", minibatch_size=2, trainer={**DDP, "default_root_dir": folder / "ppo"}
    )
    return {
        "message": str(raised.value),
        "step": stopped.trainer.global_step,
        "files": sorted(path.name for path in (folder / "sft" / "nonfinite" / "step2").iterdir()),
        "count": skipped.module.nonfinite.count,
        "weights": {name: weight.detach() for name, weight in skipped.module.named_parameters()},
    }


def test_all_ranks_decide_alike(tiny_run: TinyRun) -> None:
    first, second = in_ranks(stop_and_skip, tiny_run)
    assert first["message"] == second["message"]
    assert "optimizer step 2: the loss is nan on rank 1." in first["message"]
    assert first["step"] == second["step"] == 1
    assert first["files"] == ["batches_rank0.pt", "batches_rank1.pt", "report.json", "state.ckpt"]
    assert first["count"] == second["count"] == 1
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert all(bool(weight.isfinite().all()) for weight in first["weights"].values())
