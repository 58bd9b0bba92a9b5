"""Every call that opens a file of a model says that no code in it may run. Found by reading the source."""

import ast
from functools import cache
from pathlib import Path

import pytest

OPENERS = {"from_pretrained", "from_config"}
NOT_A_MODEL = {"GenerationConfig", "LoraConfig", "PeftModel"}
TRAINER = {"fit", "validate", "test", "predict"}


@cache
def calls(repo: Path) -> list[tuple[str, str, ast.Call]]:
    """Return location, name and node of every call in the package and the examples."""
    return [
        (f"{path.relative_to(repo)}:{node.lineno}", ast.unparse(node.func), node)
        for path in [*sorted((repo / "rlhf").rglob("*.py")), *sorted((repo / "examples").rglob("*.py"))]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def argument(call: ast.Call, name: str) -> object:
    """Return a literal keyword argument; None if it is missing or not a literal."""
    return next((getattr(word.value, "value", None) for word in call.keywords if word.arg == name), None)


def test_torch_load_never_runs_pickles(repo: Path) -> None:
    found = [(place, call) for place, name, call in calls(repo) if name == "torch.load"]
    assert len(found) >= 5
    assert [place for place, call in found if argument(call, "weights_only") is not True] == []


def test_no_other_call_unpickles(repo: Path) -> None:
    """Except the restricted unpickler of rlhf/checkpoint/shards.py."""
    forbidden = ("pickle.load", "pickle.loads", "eval", "exec", "joblib.load", "torch.jit.load")
    assert [place for place, name, _ in calls(repo) if name in forbidden] == []


def test_models_are_opened_without_remote_code(repo: Path) -> None:
    """Without the argument, transformers asks on a terminal whether to run the code."""
    found = [(place, name, call) for place, name, call in calls(repo) if name.split(".")[-1] in OPENERS]
    found = [entry for entry in found if entry[1].split(".")[0] not in NOT_A_MODEL]
    assert len(found) >= 7
    unsafe = [
        place
        for place, _, call in found
        if argument(call, "trust_remote_code") is not False and not any(word.arg is None for word in call.keywords)
    ]
    assert unsafe == []


@pytest.mark.parametrize("kind", sorted(TRAINER))
def test_lightning_reads_checkpoints_without_pickles(repo: Path, kind: str) -> None:
    """A call with a checkpoint has ``weights_only=True``: the default depends on an environment variable."""
    found = [(place, call) for place, name, call in calls(repo) if name.startswith("trainer.") and name.endswith(kind)]
    with_checkpoint = [entry for entry in found if any(word.arg == "ckpt_path" for word in entry[1].keywords)]
    assert len(with_checkpoint) >= (kind == "fit")
    assert [place for place, call in with_checkpoint if argument(call, "weights_only") is not True] == []
