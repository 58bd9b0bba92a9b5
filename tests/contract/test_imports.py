"""Import rules of CONTRIBUTING.md, checked on the source. Lazy and TYPE_CHECKING imports count."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from contract.imports import (
    FILES,
    MODULES,
    ROOT,
    file_graph,
    find_cycle,
    imports,
    module_name,
    package_graph,
    package_of,
)
from rlhf.stages import stages

STAGE_PACKAGES = set(stages()) | {"rl"}
# Layers from the bottom up. A package imports from its own layer and from the layers below it, without cycles. Stage
# packages do not import each other, except that ppo and grpo build on rl.
LAYERS: list[set[str]] = [
    {
        *("process", "errors", "distributed", "tensors", "declared", "files", "stages", "printable"),
        *("metrics", "overrides", "run_names", "schema", "settings", "speed", "suggestions", "tokenizer"),
    },
    {"models", "data", "sampling", "reward_functions", "stage", "preflight", "logs", "web", "label"},
    STAGE_PACKAGES,
    {
        "alerts",
        "artifacts",
        "callbacks",
        "chat",
        "checkpoint",
        "command",
        "fsdp",
        "config",
        "doctor",
        "export",
        "hparams",
        "lineage",
        "main",
        "output_directory",
        "pipeline",
        "replay",
        "report",
        "rounds",
        "run",
        "runs",
        "sweep",
    },
]
MAY_BUILD_ON = {"ppo": {"rl"}, "grpo": {"rl"}}
RUN_LAYER = LAYERS[-1]


def test_no_cycle_between_files() -> None:
    assert find_cycle(file_graph()) == []


def test_no_cycle_between_packages() -> None:
    assert find_cycle(package_graph()) == []


def test_find_cycle_finds_a_cycle() -> None:
    """The two tests above can fail."""
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_the_import_reader_sees_every_kind_of_import() -> None:
    assert {"torch", "rlhf.tensors"} <= imports(MODULES["rlhf.rl.objective"])
    assert "hydra.errors" in imports(MODULES["rlhf.errors"])  # inside a function


def test_every_package_is_in_one_layer() -> None:
    """A new file or package has to be added to ``LAYERS``."""
    assert package_graph().keys() == set().union(*LAYERS)
    assert sum(len(layer) for layer in LAYERS) == len(set().union(*LAYERS))


@pytest.mark.parametrize("package", sorted(package_graph()))
def test_packages_import_from_their_own_layer_and_below(package: str) -> None:
    level = next(level for level, layer in enumerate(LAYERS) if package in layer)
    allowed = set().union(*LAYERS[: level + 1])
    if package in STAGE_PACKAGES:
        allowed = allowed - STAGE_PACKAGES | MAY_BUILD_ON.get(package, set())
    assert package_graph()[package] - allowed == set()


@pytest.mark.parametrize("file", [file for file in FILES if file.name == "objective.py"], ids=module_name)
def test_objectives_are_pure(file: Path) -> None:
    """They import torch, ``rlhf.tensors`` and the standard library; ROUGE of the evaluation comes from torchmetrics."""
    allowed = {"torch", *sys.stdlib_module_names} | ({"torchmetrics"} if "evaluate" in module_name(file) else set())
    names = imports(file)
    assert not {name for name in names if name.split(".")[0] not in allowed and name != "rlhf.tensors"}


def test_tensors_import_torch_and_collective_operations_only() -> None:
    names = imports(MODULES["rlhf.tensors"])
    assert {name.split(".")[0] for name in names - {"rlhf.distributed"}} == {"torch"}


def test_only_training_code_imports_lightning() -> None:
    """Models, sampling, objectives and reward functions can be used without Lightning."""
    users = {
        module_name(file).removeprefix("rlhf.")
        for file in FILES
        if any(name.split(".")[0] in ("lightning", "pytorch_lightning") for name in imports(file))
    }
    kinds = {name.split(".")[-1] for name in users - {"logs"} if name.split(".")[0] not in RUN_LAYER}
    files = {
        "module",
        "precision",
        "base",
        "datamodule",
        "loader",
        "runner",
        "prompts",
        "reference",
        "loggers",
        "hyperparameters",
        "reporting",
        "sampling_module",
    }
    assert kinds <= files
    assert {"stage.reporting", "run"} <= users


def test_only_the_run_layer_imports_hydra() -> None:
    """errors.py imports it inside a function, to recognize Hydra's exceptions."""
    users = {name for name, file in MODULES.items() if any(n.split(".")[0] == "hydra" for n in imports(file))}
    assert {package_of(name) for name in users} <= RUN_LAYER | {"errors"}
    tree = ast.parse(MODULES["rlhf.errors"].read_text(encoding="utf-8"))
    at_import = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    at_import |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {name for name in at_import if name.split(".")[0] == "hydra"}


@pytest.mark.parametrize("name", ["rlhf", "rlhf.stages"])
def test_cheap_imports_load_no_heavy_library(name: str) -> None:
    code = f"import sys, {name}; rlhf.__version__; print(sorted({{n.split('.')[0] for n in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "'rlhf'" in loaded
    heavy = ("torch", "lightning", "transformers", "hydra", "datasets", "numpy")
    assert not [library for library in heavy if f"'{library}'" in loaded]


def test_load_model_is_a_lazy_attribute_of_the_package() -> None:
    import rlhf
    from rlhf.export import load_model

    assert rlhf.load_model is load_model
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = rlhf.no_such_name
