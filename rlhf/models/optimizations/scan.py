"""The scan of state-space models."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from rlhf.speed import speed_settings


def limit_scan_chunks(module: nn.Module) -> None:
    """Limit the number of tokens that the Mamba-2 layers of a module scan at once to ``speed.scan_chunk``.

    The scan of transformers computes a matrix of [chunk, chunk] for each head, so smaller chunks are faster on a CPU.
    The result changes by rounding only. The configuration of the model, which is exported, does not change.
    """
    limit = speed_settings().scan_chunk
    if limit is None:
        return
    layers: Iterable[Any] = module.modules()
    for layer in layers:
        if hasattr(layer, "ssm_state_size") and isinstance(getattr(layer, "chunk_size", None), int):
            layer.chunk_size = min(layer.chunk_size, limit)
