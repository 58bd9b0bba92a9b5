"""The callbacks that connect training to exports and to the pre-flight checks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import EXACT, FakeSource, TinyRun
from rlhf import callbacks
from rlhf.callbacks import ExportHeader, PreflightChecks, PreflightOnly
from rlhf.export import Export
from rlhf.stage import Result

PROVENANCE = {"stage": "sft"}


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


def test_a_checkpoint_opens_without_its_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    """The header contains all that is needed: weights, tokenizer and provenance are those of the trained module."""
    run = tiny_run.train("sft", callbacks=[ExportHeader(PROVENANCE)])
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    export = Export(str(tmp_path / "last.ckpt"))
    assert (export.kind, export.provenance) == ("language_model", PROVENANCE)
    assert export.tokenizer().get_vocab() == tiny_run.tokenizer.get_vocab()
    opened = export.language_model(tiny_run.tokenizer)
    torch.testing.assert_close(opened.state_dict(), run.module.policy.lm.state_dict(), **EXACT)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Callable[[Result], nn.Module]]]:
    """The arguments of each call of ``run_preflight``, which does nothing."""
    found: list[tuple[Any, Callable[[Result], nn.Module]]] = []
    monkeypatch.setattr(callbacks, "run_preflight", lambda module, reload: found.append((module, reload)))
    return found


def test_checks_run_before_the_first_step(tiny_run: TinyRun, tmp_path: Path, checked: list[Any]) -> None:
    """Once, on the module of the stage; training follows."""
    run = tiny_run.train("sft", callbacks=[PreflightChecks(tmp_path, PROVENANCE, only=False)])
    assert [module for module, _ in checked] == [run.module]
    assert run.trainer.global_step == 1


def test_check_only_stops_before_the_first_step(tiny_run: TinyRun, tmp_path: Path, checked: list[Any]) -> None:
    run = tiny_run.build("sft", callbacks=[PreflightChecks(tmp_path, PROVENANCE, only=True)])
    with pytest.raises(PreflightOnly):
        run.fit()
    assert len(checked) == 1
    assert run.batches == []


def test_a_failed_check_stops_the_run(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the checks raise ends the run, also with ``only=False``."""

    def fail(*_: Any) -> None:
        raise callbacks_error

    callbacks_error = ValueError("1 of 9 checks failed")
    monkeypatch.setattr(callbacks, "run_preflight", fail)
    run = tiny_run.build("sft", callbacks=[PreflightChecks(tmp_path, PROVENANCE, only=False)])
    with pytest.raises(ValueError, match="1 of 9 checks failed"):
        run.fit()
    assert run.batches == []


def test_all_ranks_report_that_rank_0_cannot_write(
    tiny_run: TinyRun, policy: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1, whose part succeeds, does not wait for a file, and rank 0 raises the original error."""
    checks, result = PreflightChecks(tmp_path, PROVENANCE, only=False), Result(policy.model, tiny_run.tokenizer)
    monkeypatch.setattr(callbacks, "save_result", lambda *_: None)
    monkeypatch.setattr(callbacks, "gather_objects", lambda own: ["The disk is full.", own])
    with pytest.raises(OSError, match=r"^The disk is full\.$"):
        checks.reload(result)

    def fail(*_: Any) -> None:
        raise PermissionError("no permission")

    announced: list[Any] = []
    monkeypatch.setattr(callbacks, "save_result", fail)
    monkeypatch.setattr(callbacks, "gather_objects", lambda own: announced.append(own) or [own, None])
    with pytest.raises(PermissionError, match="no permission"):
        checks.reload(result)
    assert announced == ["no permission"]


@pytest.mark.parametrize("kind", ["policy", "reward_model"])
def test_reload_saves_and_opens_a_result(
    tiny_run: TinyRun, policy: FakeSource, reward_model: FakeSource, tmp_path: Path, kind: str
) -> None:
    """The opened model is a new one with the same weights. No file is left."""
    output = tmp_path / "output"
    output.mkdir()
    model = {"policy": policy, "reward_model": reward_model}[kind].model
    opened = PreflightChecks(output, PROVENANCE, only=False).reload(Result(model, tiny_run.tokenizer))
    assert opened is not model
    assert type(opened) is type(model)
    torch.testing.assert_close(opened.state_dict(), model.state_dict(), **EXACT)
    assert list(output.iterdir()) == []
