"""Packages with GPU kernels: models open and compute without them."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf.models.kernels import without_kernels

# What the functions of this package do on the CPU.
KERNELS = """
def causal_conv1d_fn(*args, **keys):
    raise RuntimeError("Expected x.is_cuda() to be true")

causal_conv1d_update = causal_conv1d_fn
"""
OPEN = """
from rlhf.models import Mamba, Policy, Pretrained

tokenizer = Pretrained("model").tokenizer(())
Policy({opened}.language_model(tokenizer))
import causal_conv1d
"""


@pytest.fixture(scope="session")
def architecture() -> str:
    return "mamba"


@pytest.mark.parametrize("opened", ['Pretrained("model")', "Mamba(hidden_size=32, num_layers=1, head_dim=16)"])
def test_installed_kernels_are_not_used(
    opened: str, tmp_path: Path, repo: Path, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """transformers binds them when it imports a modeling file, so each source opens its model in a new process."""
    (tmp_path / "causal_conv1d.py").write_text(KERNELS)
    lm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = os.pathsep.join([str(tmp_path), str(repo)])
    environment, command = {**os.environ, "PYTHONPATH": path}, [sys.executable, "-c", OPEN.format(opened=opened)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_packages_can_be_imported_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fla")
    monkeypatch.setitem(sys.modules, "fla", module)
    with without_kernels():
        for name in ("fla", "mamba_ssm"):
            with pytest.raises(ImportError):
                __import__(name)
    assert sys.modules["fla"] is module
    assert "mamba_ssm" not in sys.modules
