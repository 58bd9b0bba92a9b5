"""Who may know whom (CONTRIBUTING.md, "the arrows"): read from the source, lazy imports included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "rlhf").rglob("*.py"))
SLICES = ("sft", "reward", "dpo", "ppo", "grpo", "evaluate")
# what slices stand on
GROUND = ("tensors", "rollout", "stage", "models", "data", "rewards", "rl", "checks", "errors", "logs")


def name_of(file: Path) -> str:
    """rlhf/ppo/module.py is rlhf.ppo.module, and rlhf/ppo/__init__.py is rlhf.ppo."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """Everything a file imports anywhere in it, as dotted names; relative ones resolved."""
    package = name_of(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], node.module or ""]).rstrip(".")
                if node.level
                else node.module
            )
            # "from rlhf import ppo" is rlhf.ppo
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "rlhf" else {base}
    return found


def room(name: str) -> str:
    """rlhf.ppo.module is in the room ppo; what is not ours is in none."""
    parts = name.split(".")
    return parts[1] if parts[0] == "rlhf" and len(parts) > 1 else ""


def test_the_walk_sees_the_house() -> None:
    """The rooms of the design are there, and the reader of imports finds one of each kind."""
    assert {room(name_of(file)) for file in FILES} >= {
        *SLICES,
        "tensors",
        "rollout",
        "stage",
        "models",
        "data",
        "run",
        "pipeline",
    }
    assert {"torch", "rlhf.tensors"} <= imports(ROOT / "rlhf/rl/objective.py")
    assert "hydra.errors" in imports(ROOT / "rlhf/errors.py")  # inside a function
    assert "rlhf.__version__" in imports(ROOT / "rlhf/run.py")


@pytest.mark.parametrize("file", [file for file in FILES if file.name == "objective.py"], ids=name_of)
def test_objectives_are_pure(file: Path) -> None:
    """torch, the shared tensor arithmetic and the standard library; evaluation's ROUGE comes from torchmetrics."""
    allowed = {"torch", *sys.stdlib_module_names} | ({"torchmetrics"} if "evaluate" in name_of(file) else set())
    names = imports(file)
    assert not {name for name in names if name.split(".")[0] not in allowed and name != "rlhf.tensors"}


@pytest.mark.parametrize("slice_name", SLICES)
def test_slices_do_not_know_each_other(slice_name: str) -> None:
    others = set(SLICES) - {slice_name}
    for file in (ROOT / "rlhf" / slice_name).rglob("*.py"):
        assert not {name for name in imports(file) if room(name) in others}, file


@pytest.mark.parametrize("slice_name", SLICES)
def test_slices_stand_on_the_ground_only(slice_name: str) -> None:
    """Not on run, pipeline or export, which stand on them."""
    for file in (ROOT / "rlhf" / slice_name).rglob("*.py"):
        assert {room(name) for name in imports(file)} <= {"", slice_name, *GROUND}, file


def test_nothing_below_looks_up() -> None:
    """stage, models, data, rollout and tensors know neither slices nor what runs them."""
    for file in FILES:
        if room(name_of(file)) in GROUND:
            assert {room(name) for name in imports(file)} <= {"", *GROUND}, file


def test_tensors_know_torch_only() -> None:
    assert {name.split(".")[0] for name in imports(ROOT / "rlhf/tensors.py")} == {"torch"}


def test_lightning_stays_where_training_is() -> None:
    """module.py, datamodule.py, stage.py, run.py, logs.py and alarms.py."""
    users = {
        file.name
        for file in FILES
        if any(name.split(".")[0] in ("lightning", "pytorch_lightning") for name in imports(file))
    }
    assert users <= {"module.py", "datamodule.py", "stage.py", "run.py", "logs.py", "alarms.py"}
    assert {"stage.py", "run.py"} <= users


def test_hydra_stays_where_runs_are_composed() -> None:
    """train.py, run.py, pipeline.py; errors.py asks for its exception types when one is to be explained."""
    users = {
        str(file.relative_to(ROOT))
        for file in [*FILES, ROOT / "train.py"]
        if any(name.split(".")[0] == "hydra" for name in imports(file))
    }
    assert users <= {"train.py", "rlhf/run.py", "rlhf/pipeline.py", "rlhf/errors.py"}
    assert {"train.py", "rlhf/run.py"} <= users
    tree = ast.parse((ROOT / "rlhf/errors.py").read_text())
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {name for name in top if name.split(".")[0] == "hydra"}


def test_importing_rlhf_is_free() -> None:
    """A fresh process that imports rlhf and asks for its version has loaded no heavy library."""
    code = "import sys, rlhf; rlhf.__version__; print(sorted({n.split('.')[0] for n in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "rlhf" in loaded
    assert not [
        name for name in ("torch", "lightning", "transformers", "hydra", "datasets", "numpy") if f"'{name}'" in loaded
    ]


def test_load_model_is_found_on_rlhf() -> None:
    """Free to import, and yet there: fetched when first used; an unknown name is still an AttributeError."""
    import rlhf
    from rlhf.export import load_model

    assert rlhf.load_model is load_model
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = rlhf.no_such_name
