"""RLHF with PyTorch Lightning: supervised fine-tuning, reward models, PPO and DPO for transformers and Mamba."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.export import load_model

__all__ = ["__version__", "load_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``load_model`` is fetched when first used, so that ``import rlhf`` costs nothing (it would load torch)."""
    if name == "load_model":
        return import_module("rlhf.export").load_model
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
