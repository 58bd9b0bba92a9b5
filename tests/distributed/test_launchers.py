"""The whole pipeline, and errors, on two ranks that Lightning or torchrun starts."""

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from contract.configs import compose_config
from harness import TINY_DATA, TINY_MODEL, train_command
from ranks import DDP_OVERRIDES, RANKS, train_in_ranks
from rlhf.config import resolve_trainer

SMALL = [override for override in (*TINY_MODEL["transformer"], *TINY_DATA) if override != "trainer=cpu"]
PIPELINE = ["data.max_rows=8", "data.batch_size=4", "data.max_length=64", "trainer.max_steps=2"]
STEPS = {  # of the pipeline, with their overrides
    "sft": "'stage.max_new_tokens=4'",
    "reward": "",
    "ppo": "'stage.minibatch_size=4','stage.sampling.max_new_tokens=4'",
    "dpo": "",
    "evaluate": "'stage.sampling.max_new_tokens=4','stage.bootstrap=10'",
}
FAILS_ON_RANK_1 = """
import lightning
from rlhf.errors import ConfigError

class FailsOnRank1(lightning.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_rank == 1:
            raise ConfigError("A fault on rank 1.", "Its fix.")
"""


@pytest.fixture(params=["lightning", "torchrun"])
def torchrun(request: pytest.FixtureRequest) -> bool:
    """Whether torchrun starts both ranks, or Lightning starts rank 1."""
    return bool(request.param == "torchrun")


def test_two_ranks_run_the_pipeline(tmp_path: Path, torchrun: bool) -> None:
    """Every step finds the outputs of the steps before. Files, folders and tables are written once, by rank 0.

    All steps run on ranks that Lightning starts, and three of them with torchrun.
    """
    steps = ("sft", "dpo", "evaluate") if torchrun else tuple(STEPS)
    chosen = [f"pipeline.steps=[{','.join(steps)}]", *(f"pipeline.overrides.{step}=[{STEPS[step]}]" for step in steps)]
    code, printed = train_in_ranks(
        tmp_path, *SMALL, *PIPELINE, *chosen, f"pipeline.report={not torchrun}", torchrun=torchrun
    )
    assert code == 0, printed[-5000:]
    run = tmp_path / "rlhf"
    files = {"final_rl_model.pt"} if torchrun else {"final_rl_model.pt", "report.html"}
    assert {path.name for path in run.iterdir()} == {*steps[:-1], "pipeline", "evaluation", "ref_logprobs", *files}
    assert {path.name for path in (run / "pipeline").iterdir()} == {".hydra", ".lock", "pipeline.log"}
    assert {path.name for path in (run / "pipeline" / ".hydra").iterdir()} == {
        *("config.yaml", "hydra.yaml", "overrides.yaml")
    }
    for number, step in enumerate(steps, 1):
        folder = run / ("evaluation" if step == "evaluate" else step)
        assert (folder / ".hydra" / "config.yaml").is_file()
        assert len(list((folder / "tensorboard").iterdir())) == 1
        for text in (printed, (run / "pipeline" / "pipeline.log").read_text()):
            assert text.count(f"step {number} of {len(steps)}: {step}\n") == 1
        lines = [line.partition(" INFO ")[2] for line in (folder / f"{step}.log").read_text().splitlines()]
        assert max(Counter(filter(None, lines)).values()) == 1
    assert printed.count("8 held-out prompts") == 1
    assert printed.count("Outputs; ") == 1
    assert "Traceback" not in printed


def test_an_error_on_one_rank_ends_all_ranks_with_its_message(
    tmp_path: Path, torchrun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank then loses its connection, which is not reported. torchrun has its own report and exit code, 1."""
    (tmp_path / "faults.py").write_text(FAILS_ON_RANK_1)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fault = "+callbacks.fault={_target_: faults.FailsOnRank1}"
    code, printed = train_in_ranks(tmp_path, "stage=sft", *SMALL, fault, torchrun=torchrun)
    assert code == (1 if torchrun else 2), printed[-5000:]
    assert printed.count("A fault on rank 1.\n  Its fix.\n") == 1
    assert printed.count("Traceback") == (1 if torchrun else 0)
    assert "closed by peer" not in printed


FAILS_WITH_NCCL = """
import time
import lightning
import torch.distributed as dist
from rlhf.errors import ConfigError

class FailsWithNCCL(lightning.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_rank == 1:
            time.sleep(600)  # as in a collective operation that rank 0 does not join
        dist.get_backend = lambda: "nccl"
        dist.destroy_process_group = lambda: time.sleep(600)
        raise ConfigError("A fault on rank 0.", "Its fix.")
"""


def test_rank_0_ends_the_ranks_that_wait_for_it(tmp_path: Path, repo: Path) -> None:
    """The command runs in a new process: forked ones have no functions that run at their exit."""
    (tmp_path / "faults.py").write_text(FAILS_WITH_NCCL)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repo), str(tmp_path)])}
    fault = "+callbacks.fault._target_=faults.FailsWithNCCL"
    command = train_command(tmp_path, "stage=sft", *SMALL, *DDP_OVERRIDES, fault)
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr[-5000:]
    assert done.stderr.count("A fault on rank 0.\n  Its fix.\n") == 1


STOPS_ON_RANK_0 = """
import os, signal
import lightning

class StopsOnRank0(lightning.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank == 0 and trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def test_sigterm_on_rank_0_stops_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own handler starts a broadcast, which the other rank would wait for while it averages gradients."""
    (tmp_path / "faults.py").write_text(STOPS_ON_RANK_0)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fault = "+callbacks.fault={_target_: faults.StopsOnRank0}"
    steps = ("data.batch_size=2", "trainer.max_epochs=100")
    code, printed = train_in_ranks(tmp_path, "stage=sft", *SMALL, fault, *steps, torchrun=False, timeout=60)
    assert code == 143, printed[-5000:]
    assert printed.count("Training was terminated by SIGTERM at step ") == 1
    assert "Traceback" not in printed
    assert not list(tmp_path.rglob("*_final.pt"))


def test_an_error_on_all_ranks_is_reported_once(tmp_path: Path) -> None:
    """With torchrun, all ranks read the configuration before they are connected."""
    code, printed = train_in_ranks(tmp_path, "stage=dpo", "stage.betta=1", torchrun=True)
    assert code == 1
    assert printed.count("stage.betta: there is no such key.") == 1


def test_the_number_of_processes_follows_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torchrun --nnodes 3 --nproc-per-node 2`` needs no ``trainer.devices``. Without it, all devices are used."""
    flags = compose_config("stage=sft", "trainer=ddp").trainer
    assert (flags.devices, flags.num_nodes) == ("auto", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(RANKS))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    flags = compose_config("stage=sft", "trainer=ddp").trainer
    assert (flags.devices, flags.num_nodes) == (RANKS, 3)


@pytest.mark.parametrize(("supported", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
@pytest.mark.parametrize("choice", ["ddp", "fsdp"])
def test_the_precision_is_one_that_the_devices_have_instructions_for(
    choice: str, supported: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processors compute products in bfloat16 at a small part of the speed of float32."""
    monkeypatch.setattr("rlhf.config.has_bfloat16", lambda accelerator: supported)
    cfg = compose_config("stage=sft", f"trainer={choice}", "trainer.accelerator=cpu")
    resolve_trainer(cfg)
    assert cfg.trainer.precision == precision
