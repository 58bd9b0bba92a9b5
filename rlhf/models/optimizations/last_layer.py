"""The last layer of a trunk, whose MLP computes only those tokens whose last hidden states are used."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.checkpointing import recomputes_layers
from rlhf.models.probes import FAILURES, are_close, has_active_dropout, once_per_architecture, probing

MAX_USED = 0.8  # above this fraction of tokens, selecting them no longer saves time


@contextmanager
def partial_last_layer(trunk: nn.Module, used: Tensor) -> Iterator[None]:
    """Let the MLP of the last layer compute some tokens only. The last hidden states of the others are undefined.

    Attention and all earlier layers compute every token, because later tokens attend to it.

    Args:
        trunk: A model that ``allows_partial_last_layer``.
        used: [used tokens] indices among the [batch * time] tokens of the forward pass. An index may occur twice.
    """
    shape = torch.Size()

    def select(mlp: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        nonlocal shape
        shape = arguments[0].shape
        return arguments[0].flatten(0, 1).index_select(0, used)[None]

    def restore(mlp: nn.Module, arguments: object, output: Tensor) -> Tensor:
        tokens, order = shape[:2].numel(), torch.arange(len(used), device=used.device)
        # If an index occurs twice, one of the outputs is written after the last token, so that its gradient is zero.
        last_of = used.new_zeros(tokens).scatter(0, used, order)
        targets = torch.where(last_of[used] == order, used, tokens)
        return output.new_zeros(tokens + 1, shape[-1]).index_copy(0, targets, output[0])[:-1].view(shape)

    mlp = last_layer(trunk).mlp
    with mlp.register_forward_pre_hook(select), mlp.register_forward_hook(restore):
        yield


def saves_last_layer(trunk: nn.Module, used: int, computed: int) -> bool:
    """Return whether ``partial_last_layer`` gives the same states in less time.

    Args:
        trunk: A causal model without its output layer.
        used: Number of tokens whose last hidden states are used.
        computed: Number of tokens of the forward pass, padding included.
    """
    if used >= MAX_USED * computed or not allows_partial_last_layer(trunk):
        return False
    layer = last_layer(trunk)
    # Gradient checkpointing recomputes the layer outside of the context, and dropout would draw other random numbers.
    return not has_active_dropout(layer.mlp) and not recomputes_layers(layer)


@once_per_architecture
def allows_partial_last_layer(trunk: Any) -> bool:
    """Return whether the MLP of the last layer computes each token separately, and whether no tokens mix after it.

    The first call for an architecture makes two short forward passes. ``Policy`` and ``ScalarModel`` make it when they
    are created.
    """
    try:
        with probing(trunk):
            inputs = {"input_ids": torch.arange(3, device=trunk.device).repeat(2, 1), "use_cache": False}
            expected = trunk(**inputs).last_hidden_state.flatten(0, 1)
            used = torch.tensor([1, 5, 1], device=trunk.device)
            with partial_last_layer(trunk, used):
                found = trunk(**inputs).last_hidden_state.flatten(0, 1)
    except FAILURES:
        return False
    return are_close(found[used], expected[used])


def last_layer(trunk: Any) -> Any:
    """Return the last decoder layer; transformers stores the layers under one of two names."""
    return (trunk.layers if hasattr(trunk, "layers") else trunk.h)[-1]
