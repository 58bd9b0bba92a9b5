"""What models support, found in their configuration and modules or by probes, which are short forward passes."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Exceptions that models raise for an unsupported operation.
FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)

Result = TypeVar("Result")


def are_close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding errors of their precision."""
    is_float32 = found.dtype == torch.float32 and not torch.is_autocast_enabled(found.device.type)
    tolerance = 1e-4 if is_float32 else 0.02
    return bool((found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())


def has_full_attention(config: Any) -> bool:
    """Return whether every layer of a model attends to all earlier tokens.

    A forward pass that is shorter than a sliding window would not find this out.

    Args:
        config: The configuration of a transformers model.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return not window and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}


def has_full_sdpa(config: Any) -> bool:
    """Return whether a model ``has_full_attention`` and computes it by PyTorch's SDPA."""
    return has_full_attention(config) and config.get_text_config()._attn_implementation == "sdpa"


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the settings of the rotary positions of a model: one for all layers, or one for each kind of layer."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [one for one in (parameters, *parameters.values()) if isinstance(one, dict) and "rope_type" in one]


def has_active_dropout(module: nn.Module) -> bool:
    """Return whether a forward pass of a module draws random numbers for dropout."""
    kind = nn.modules.dropout._DropoutNd
    return any(isinstance(part, kind) and part.training and part.p > 0 for part in module.modules())


def once_per_architecture(check: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Remember the result of a check for each model, and share it with other models of the same architecture."""
    of_models: WeakKeyDictionary[nn.Module, Result] = WeakKeyDictionary()
    of_architectures: dict[Hashable, Result] = {}

    @wraps(check)
    def remembered(model: Any) -> Result:
        if model not in of_models:
            architecture = _architecture(model)
            results = {} if architecture is None else of_architectures
            if architecture not in results:
                results[architecture] = check(model)
            of_models[model] = results[architecture]
        return of_models[model]

    return remembered


def _architecture(model: Any) -> Hashable:
    """Return what the forward pass of a model depends on, apart from its weights; None if that is not known.

    Hooks may change the forward pass, and models on the meta device have no values to compare.
    """
    parts = list(model.modules())
    has_hooks = any("forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks for part in parts)
    if has_hooks or model.device.type == "meta":
        return None
    return (
        tuple(map(type, parts)),
        model.config.to_json_string(use_diff=False),
        model.config.get_text_config()._attn_implementation,
        model.dtype,
        model.device.type,
        torch.is_autocast_enabled(model.device.type),
    )


@once_per_architecture
def length_boundary(model: Any) -> int | None:
    """Return the number of tokens above which a model encodes positions with other frequencies; None if there is none.

    transformers chooses the frequencies of LongRoPE (Ding et al. 2024, arXiv:2402.13753) for all rows of a forward pass
    by the longest one.
    """
    longrope = (one for one in rope_parameters(model.config) if one["rope_type"] == "longrope")
    return min((one["original_max_position_embeddings"] for one in longrope), default=None)


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, without gradients, in this context."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
