"""Rotary positions, whose frequencies stay in float32 under any precision."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def float32_frequencies(model: nn.Module) -> Iterator[None]:
    """Keep the dtype of rotary frequencies while a model is converted in this context.

    In bfloat16, the phase of a token at position 1,000 can be wrong by more than 1 radian (Su et al. 2021,
    arXiv:2104.09864). transformers keeps the frequencies in float32 when it opens a model in bfloat16.

    Args:
        model: A model of transformers.
    """
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    ]
    yield
    for module, name, buffer in buffers:
        converted = getattr(module, name)
        if converted.dtype != buffer.dtype:
            setattr(module, name, buffer.to(converted.device))
